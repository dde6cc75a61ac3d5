"""What a search minimizes or maximizes, and the measures of a set of trade-offs: non-dominance and hypervolume."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moocore
import numpy as np

from quant.errors import JointoptError

DIRECTIONS = {
    "quality": "max",
    "accuracy": "max",
    "loss": "min",
    "kl": "min",
    "perplexity": "min",
    "size": "min",
    "macs": "min",
    "bops": "min",
    "parameters": "min",
    "cache": "min",
    "decode_macs": "min",
}
COSTS = ("size", "macs", "bops", "parameters", "cache", "decode_macs")


@dataclass(frozen=True)
class Objective:
    """A number to be made small or large.

    Attributes:
        name: what it is called in the study; for a measured one, the name of the metric.
        direction: "min" or "max".
        compute: genomes [n, genes] -> exact values [n], where no model has to run. Such an objective is never
            predicted.
    """

    name: str
    direction: str
    compute: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("min", "max"):
            raise JointoptError(f"objective {self.name!r}: direction {self.direction!r}; allowed: min, max")

    @property
    def sign(self) -> float:
        """Times a value, it gives what is to be minimized."""
        return 1.0 if self.direction == "min" else -1.0


def named(objective: str | Objective | dict[str, str]) -> Objective:
    """An objective from its name, or from {name: direction} where the name is none of the known."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, dict) and len(objective) == 1:
        name, direction = next(iter(objective.items()))
        return Objective(str(name), str(direction))
    if not isinstance(objective, str):
        raise JointoptError(f"objectives: found {objective!r}; allowed: a name, or one name with its direction")
    if objective not in DIRECTIONS:
        near = difflib.get_close_matches(objective, DIRECTIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise JointoptError(
            f"objective {objective!r}: has no known direction{hint} Known: {', '.join(DIRECTIONS)}; "
            "for a metric of your own: {name: min} or {name: max}"
        )
    return Objective(objective, DIRECTIONS[objective])


def minimized(values: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Values [n, objectives] with their signs turned so that less is better."""
    return np.asarray(values, dtype=float) * np.array([objective.sign for objective in objectives])


def non_dominated(costs: np.ndarray) -> np.ndarray:
    """For each row of `costs` (less is better), whether no other row is at least as good in all and better in one.

    Rows with a NaN are not. Of equal rows the first counts.
    """
    kept = np.zeros(len(costs), dtype=bool)
    rows = np.flatnonzero(np.isfinite(costs).all(axis=1))
    rows = rows[np.lexsort(costs[rows].T[::-1])]
    if costs.shape[1] == 2 and len(rows):
        second = costs[rows, 1]
        kept[rows[second < np.concatenate([[np.inf], np.minimum.accumulate(second)[:-1]])]] = True
        return kept
    for at in rows:
        kept[at] = not (costs[kept] <= costs[at]).all(axis=1).any()
    return kept


def hypervolume(costs: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """Volume that `costs` [n, objectives], less is better, dominate within `reference`; rows beyond it add nothing."""
    limits = np.asarray(reference, dtype=float)
    inside = costs[np.isfinite(costs).all(axis=1)]
    inside = inside[(inside < limits).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=limits)) if len(inside) else 0.0
