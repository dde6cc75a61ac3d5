"""Where a study's hypervolume is measured from: a point that its first evaluations settle, so that later ones move none
of the earlier figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from jointopt.objectives import Objective, minimized
from jointopt.study.choice import costs_of

FIRST = 10
"""Evaluations that the reference point is beyond."""
EXPLODED = 1000
"""Times as far from the best as the median: a metric so far off would make all the others look alike."""


def reference_point(
    frame: pd.DataFrame, objectives: Sequence[Objective], measured: Sequence[Objective], original: Mapping[str, float]
) -> list[float] | None:
    """10% beyond the worst of the original's values and those of the evaluations up to number FIRST, but for those that
    exploded; where all of these failed, of the next that did not. None before there is one.

    Args:
        frame: evaluations, as `Study.evaluations` has them.
        measured: the objectives that may explode: those that are no costs.
        original: its metrics and costs, if any are known.
    """
    costs, first = costs_of(frame, objectives), (frame["number"] <= FIRST).to_numpy()
    succeeded = np.isfinite(costs).all(axis=1)
    if not succeeded.any():
        return None
    costs = costs[succeeded & first] if (succeeded & first).any() else costs[succeeded][:1]
    known = [original.get(objective.name, np.nan) for objective in objectives]
    if np.isfinite(known).all():
        costs = np.vstack([costs, minimized(np.array([known]), objectives)])
    costs = _without_exploded(costs, [at for at, each in enumerate(objectives) if each in measured])
    worst, best = costs.max(0), costs.min(0)
    span = np.where(worst > best, worst - best, np.where(worst == 0, 1.0, np.abs(worst)))
    return ((worst + 0.1 * span) * np.array([objective.sign for objective in objectives])).tolist()


def _without_exploded(costs: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """The rows in which none of these columns is EXPLODED times as far from its best as its median is, then of those
    that are left, until all are near."""
    for at in columns:
        left = 0
        while left != len(costs):
            left = len(costs)
            away = costs[:, at] - costs[:, at].min()
            far = EXPLODED * np.median(away)
            costs = costs[away <= far] if far > 0 else costs
    return costs
