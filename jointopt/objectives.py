"""What a search minimizes or maximizes, and the measures of a set of trade-offs: non-dominance and hypervolume."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moocore
import numpy as np

from quant.errors import JointoptError, did_you_mean


@dataclass(frozen=True)
class Quantity:
    """A metric or a cost that is known by its name.

    Attributes:
        direction: "min" or "max": in which it is better.
        source: what gives it: "quality", the quality function; "shapes", those of the sub-network alone; "hardware", a
            model of latency.
        scale: what values are divided by before they are shown.
        label: of its axis, with the unit; None for its name.
        unit: that is written behind a value.
        range: its least and most, as the tasks measure it. A function of the user's may give another by this name:
            percent, say.
    """

    direction: str
    source: str = "quality"
    scale: float = 1.0
    label: str | None = None
    unit: str = ""
    range: tuple[float, float] = (-math.inf, math.inf)


QUANTITIES = {
    "quality": Quantity("max"),
    "accuracy": Quantity("max", range=(0.0, 1.0)),
    "f1": Quantity("max", range=(0.0, 1.0)),
    "pearson": Quantity("max", range=(-1.0, 1.0)),
    "loss": Quantity("min", range=(0.0, math.inf), label="loss (nats)", unit="nats"),
    "mse": Quantity("min", range=(0.0, math.inf)),
    "kl": Quantity("min", range=(0.0, math.inf), label="KL divergence from the original (nats)", unit="nats"),
    "perplexity": Quantity("min", range=(1.0, math.inf)),
    "size": Quantity("min", "shapes", 1e6, "size (MB)", "MB"),
    "macs": Quantity("min", "shapes", 1e6, "MACs a sample (millions)", "million"),
    "bops": Quantity("min", "shapes", 1e9, "BOPs a sample (billions)", "billion"),
    "parameters": Quantity("min", "shapes", 1e6, "parameters (millions)", "million"),
    "cache": Quantity("min", "shapes", 1e3, "cache a token (kB)", "kB"),
    "decode_macs": Quantity("min", "shapes", 1e6, "MACs of one more token (millions)", "million"),
    "latency": Quantity("min", "hardware", 1e-3, "latency (ms)", "ms"),
    "decode_latency": Quantity("min", "hardware", 1e-3, "latency of one more token (ms)", "ms"),
    "energy": Quantity("min", "hardware", 1e-3, "energy (mJ)", "mJ"),
    "decode_energy": Quantity("min", "hardware", 1e-3, "energy of one more token (mJ)", "mJ"),
    "peak_memory": Quantity("min", "hardware", 1e6, "peak memory (MB)", "MB"),
}
"""All that are known, in the order in which they are listed."""
ON_HARDWARE = tuple(name for name, each in QUANTITIES.items() if each.source == "hardware")
"""Costs that a model of latency answers for."""
ENERGIES = ("energy", "decode_energy")
"""Of these, what only a device's power figures give, and no timing."""
COSTS = tuple(name for name, each in QUANTITIES.items() if each.source != "quality")
EVALUATIONS = 200
"""Of a search to which no budget is given."""


COLUMNS = ("number", "generation", "genome", "failed", "seconds")
"""What a study's table of evaluations has beside metrics and costs; and predicted_NAME."""


def is_column(name: str) -> bool:
    """Whether a study has a column of this name anyway, so that it is none for a metric."""
    return name in COLUMNS or name.startswith("predicted_")


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
        if not isinstance(self.name, str):
            raise JointoptError(f"objective: found the name {self.name!r}; allowed: text")
        if is_column(self.name):
            raise JointoptError(f"objective {self.name!r}: every study has a column of this name; allowed: another")
        if self.direction not in ("min", "max"):
            raise JointoptError(f"objective {self.name!r}: direction {self.direction!r}; allowed: min, max")

    @property
    def sign(self) -> float:
        """Times a value, it gives what is to be minimized."""
        return 1.0 if self.direction == "min" else -1.0

    def values(self, genomes: np.ndarray) -> np.ndarray:
        """What `compute` gives, [n]. Raises JointoptError for another shape, and for what is no finite number."""
        assert self.compute is not None
        given = np.asarray(self.compute(genomes.copy()))  # which it may write to
        try:
            found = given.astype(float) if given.dtype.kind in "biufO" else None
        except (TypeError, ValueError):
            found = None
        if found is None:
            raise JointoptError(f"objective {self.name!r}: compute gave {given.dtype}; allowed: numbers")
        if found.shape != (len(genomes),) or not np.isfinite(found).all():
            told = f"shape {found.shape}" if found.shape != (len(genomes),) else "a value that is not finite"
            raise JointoptError(f"objective {self.name!r}: compute gave {told}; allowed: ({len(genomes)},), finite")
        return found

    def check_alone(self, genomes: np.ndarray) -> None:
        """Raises JointoptError where what `compute` gives for a genome depends on those it is asked for with: they are
        others for the strategy than for the study."""
        together = self.values(genomes)
        for genome, value in zip(genomes, together, strict=True):
            alone = self.values(genome[None])[0]
            if not same_values(alone, value, together):
                raise JointoptError(
                    f"objective {self.name!r}: compute gave {alone:.9g} for a genome by itself, and {value:.9g} among "
                    "others; allowed: the same"
                )


def same_values(found: np.ndarray, known: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Whether values are the same but for last bits, as float32 on other devices or in other batches has them.

    Args:
        among: values by whose largest those near 0 are judged.
    """
    return np.isclose(found, known, rtol=1e-3, atol=1e-6 * float(np.abs(among).max()))


def named(objective: str | Objective | dict[str, str]) -> Objective:
    """An objective from its name, or from {name: direction} where the name is none of the known."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, dict) and len(objective) == 1:
        name, direction = next(iter(objective.items()))
        return Objective(str(name), str(direction))
    if not isinstance(objective, str):
        raise JointoptError(f"objectives: found {objective!r}; allowed: a name, or one name with its direction")
    if objective not in QUANTITIES:
        near = did_you_mean(objective, QUANTITIES)
        raise JointoptError(
            f"objective {objective!r}: has no known direction{near}; known: {', '.join(QUANTITIES)}; "
            "for a metric of your own: {name: min} or {name: max}"
        )
    return Objective(objective, QUANTITIES[objective].direction)


def cost_and_unit(name: str) -> tuple[str, float]:
    """The cost or metric that a constraint is on, and what its limit counts in: "size_mb" is the size in 10^6 bytes."""
    return ("size", 1e6) if name == "size_mb" else (name, 1.0)


@dataclass(frozen=True)
class Constraint:
    """A limit that a genome must keep to, so that evaluations go where the user will choose.

    Attributes:
        name: of an objective, or of a number that `compute` gives.
        limit: in the objective's own unit.
        relation: "<=" or ">=".
        compute: genomes [n, genes] -> exact values [n], where it is no objective's name.
    """

    name: str
    limit: float
    relation: str
    compute: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.relation not in ("<=", ">="):
            raise JointoptError(f"constraint {self.name!r}: relation {self.relation!r}; allowed: <=, >=")
        if not isinstance(self.limit, int | float) or not math.isfinite(self.limit):
            raise JointoptError(f"constraint {self.name!r}: limit {self.limit!r}; allowed: a finite number")

    def __str__(self) -> str:
        return f"{self.name} {self.relation} {self.limit:g}"

    def check_within(self, least: float, most: float) -> None:
        """Raises JointoptError where no value from `least` to `most` keeps to it."""
        if (self.limit < least) if self.relation == "<=" else (self.limit > most):
            allowed = f"from {least:g} to {most:g}" if math.isfinite(most) else f"from {least:g}"
            raise JointoptError(f"constraints {self}; allowed: a number {allowed}, as all {self.name} is")

    def excess(self, values: np.ndarray) -> np.ndarray:
        """How far values are beyond the limit, 0 where they keep to it; in the shape of `values`."""
        return np.maximum((values - self.limit) * (1.0 if self.relation == "<=" else -1.0), 0.0)


def constraint(name: str, text: str, compute: Callable[[np.ndarray], np.ndarray] | None = None) -> Constraint:
    """A constraint as a config writes it: `constraint("accuracy", ">= 0.9")`."""
    found = re.fullmatch(r"\s*(<=|>=)\s*(\S+)\s*", text) if isinstance(text, str) else None
    try:
        limit = float(found.group(2)) if found else math.nan
    except ValueError:
        limit = math.nan
    if not found or not math.isfinite(limit):
        raise JointoptError(f"constraint {name!r}: found {text!r}; allowed: '<= number' or '>= number'")
    return Constraint(name, limit, found.group(1), compute)


def minimized(values: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Values [n, objectives] with their signs turned so that less is better."""
    return np.asarray(values, dtype=float) * np.array([objective.sign for objective in objectives])


def non_dominated(costs: np.ndarray) -> np.ndarray:
    """For each row of `costs` (less is better), whether no other row is at least as good in all and better in one.

    Rows with a NaN are not. Of equal rows the first counts.
    """
    kept = np.isfinite(costs).all(axis=1)
    if kept.any():
        kept[kept] = moocore.is_nondominated(costs[kept], keep_weakly=False)
    return kept


def hypervolume(costs: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """Volume that `costs` [n, objectives], less is better, dominate within `reference`; rows beyond it add nothing."""
    limits = np.asarray(reference, dtype=float)
    inside = costs[np.isfinite(costs).all(axis=1)]
    inside = inside[(inside < limits).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=limits)) if len(inside) else 0.0
