"""Which of a study's evaluations is the one: the front of a table of them, what keeps to limits, what fits a wish.

Tables are data frames as `Study.evaluations` gives them, one row an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jointopt.objectives import Constraint, Objective, cost_and_unit, minimized, non_dominated
from quant.errors import JointoptError


def costs_of(frame: pd.DataFrame, objectives: Sequence[Objective]) -> np.ndarray:
    """The objectives [rows, objectives], signs turned so that less is better; NaN where an evaluation failed."""
    return minimized(frame.reindex(columns=[o.name for o in objectives]).to_numpy(dtype=float), objectives)


def front_of(frame: pd.DataFrame, objectives: Sequence[Objective]) -> pd.DataFrame:
    """The non-dominated rows, in the order of the last objective, best first; of rows equal in all objectives the
    smallest, then the first."""
    if frame.empty:
        return frame
    costs = costs_of(frame, objectives)
    by_size = np.argsort(_size(frame), kind="stable")
    kept = np.zeros(len(frame), dtype=bool)
    kept[by_size] = non_dominated(costs[by_size])
    return frame[kept].iloc[np.lexsort(costs[kept].T)].reset_index(drop=True)


def keeping_to(frame: pd.DataFrame, constraints: Sequence[Constraint]) -> pd.DataFrame:
    """The rows that keep to all constraints. Raises JointoptError where none does, naming the closest."""
    excess = np.zeros(len(frame))
    for each in constraints:
        name, unit = cost_and_unit(each.name)
        values = frame[name].to_numpy(dtype=float) / unit
        beyond = each.excess(values)
        if beyond.min() > 0:
            raise JointoptError(f"constraints: no evaluation has {each}; the closest has {values[beyond.argmin()]:.4g}")
        excess += beyond
    if not (excess == 0).any():
        limits = ", ".join(map(str, constraints))
        raise JointoptError(f"constraints: no evaluation has {limits} together, though each alone")
    return frame[excess == 0]


def with_finished(
    frame: pd.DataFrame, finished: Sequence[Mapping[str, Any]], rounding: str, qualities: Sequence[Objective]
) -> pd.DataFrame:
    """The rows, with the metrics of sub-networks finished by `rounding` in place of their own where they are better.

    Args:
        finished: records of `Study.finished`.
        qualities: what they are compared by, see `improves`.
    """
    frame = frame.copy()
    for record in (each for each in finished if each["rounding"] == rounding):
        for at in frame.index[frame["genome"] == tuple(record["genome"])]:
            if improves(record["metrics"], frame.loc[at], qualities):
                for name, value in record["metrics"].items():
                    frame.loc[at, name] = value
    return frame


def improves(metrics: Mapping[str, float], known: Any, qualities: Sequence[Objective]) -> bool:
    """Whether metrics are better than the known ones in the first of the qualities in which the two differ: where as
    many samples are right, a lower divergence decides."""
    new, old = ([values[each.name] * each.sign for each in qualities] for values in (metrics, known))
    return new < old


def best_of(
    frame: pd.DataFrame,
    objectives: Sequence[Objective],
    quality: Objective,
    original: float | None,
    exact: Sequence[str] = (),
    size_mb: float | None = None,
    drop: float | None = None,
    knee: bool = False,
) -> np.ndarray:
    """The genome that fits: see `Study.best`. Of those that are as good in what is asked for, the one that is better in
    the objectives, so that none that fits dominates it.

    Args:
        frame: evaluations that did not fail, one or more.
        exact: names of the objectives that are not measured.
        original: the original model's quality.
    """
    cost = frame[quality.name].to_numpy(dtype=float) * quality.sign
    if knee:
        return _knee(frame, objectives)
    ties = _by_objectives(frame, objectives)
    if size_mb is None and drop is None:
        return _first(frame, cost, *ties)
    if size_mb is not None:
        if "size" not in frame:
            raise JointoptError("best: the study has no size; search with 'size' among the objectives")
        megabytes = _size(frame) / 1e6  # as constraints have it: the limit times 1e6 may round to less than a size
        fits = megabytes <= size_mb
        if not fits.any():
            raise JointoptError(f"size_mb: found {size_mb}; the smallest evaluated has {megabytes.min()} MB")
        return _first(frame, np.where(fits, cost, np.inf), *ties)
    others = [objective for objective in objectives if objective is not quality]
    if not others:
        raise JointoptError(
            f"drop: found {drop}, and {quality.name} is the study's one objective, so that nothing is won by giving it "
            "up; allowed: with a cost among the objectives, such as size"
        )
    if original is None:
        raise JointoptError(f"drop: the study has no {quality.name} of the original model")
    worse = cost - original * quality.sign
    fits = worse <= (drop or 0.0) + 1e-12
    if not fits.any():
        raise JointoptError(f"drop: found {drop}; the best {quality.name} evaluated is worse by {worse.min():.4g}")
    sought = min(others, key=lambda objective: (objective.name != "size", objective.name not in exact))
    return _first(frame, np.where(fits, costs_of(frame, [sought])[:, 0], np.inf), cost, *ties)


def _size(frame: pd.DataFrame) -> np.ndarray:
    return frame["size"].to_numpy(dtype=float) if "size" in frame else np.zeros(len(frame))


def _by_objectives(frame: pd.DataFrame, objectives: Sequence[Objective]) -> list[np.ndarray]:
    """What decides between rows that are otherwise equal: size where it is an objective, the others, size where not."""
    ordered = sorted(objectives, key=lambda objective: objective.name != "size")
    return [*costs_of(frame, ordered).T, _size(frame)]


def _first(frame: pd.DataFrame, *keys: np.ndarray) -> np.ndarray:
    """The genome of the row with the least of the first key, of those the one with the least of the second, ..."""
    at = np.lexsort((frame["number"].to_numpy(), *reversed(keys)))[0]
    return np.array(frame.iloc[at]["genome"], dtype=np.int64)


def _knee(frame: pd.DataFrame, objectives: Sequence[Objective]) -> np.ndarray:
    front = front_of(frame, objectives)
    costs = costs_of(front, objectives)
    span = np.where(np.ptp(costs, axis=0) > 0, np.ptp(costs, axis=0), 1.0)
    scaled = (costs - costs.min(0)) / span
    return _first(front, scaled.sum(axis=1), scaled[:, 0])
