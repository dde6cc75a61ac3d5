"""What a search is asked for: objectives and constraints by name, as functions of a super-network's genomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jointopt import strategies
from jointopt.evaluation.evaluation import Quality, measured
from jointopt.objectives import COSTS, ON_HARDWARE, Constraint, Objective, constraint, cost_and_unit, named
from jointopt.sensitivity import telling
from jointopt.strategies.feasible import descended
from quant.errors import JointoptError, did_you_mean
from search_spaces.precision import is_cache

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

Column = Callable[[np.ndarray], np.ndarray]
"""Genomes [n, genes] -> what a cost is for each of them [n]."""


def resolved(
    supernet: Supernet, objectives: Sequence[Any], constraints: Mapping[str, str]
) -> tuple[dict[str, float], list[Objective], list[Constraint]]:
    """The original's costs, the objectives, and the limits, that of a device's memory among them.

    Raises:
        JointoptError: what is no objective or no constraint of this super-network, a device whose memory its smallest
            sub-network does not fit into.
    """
    original = {name: float(value) for name, value in supernet.original_costs().items()}
    wanted = _objectives(supernet, objectives, original)
    return original, wanted, _constraints(supernet, wanted, constraints, original)


def check_wishes(
    supernet: Supernet,
    objectives: Sequence[Any],
    constraints: Mapping[str, str],
    quality: Quality | None,
    warm_start: bool,
) -> None:
    """Raises early what `search` would raise; runs the quality function, where given, on the original once to see which
    metrics it returns."""
    _, wanted, limits = resolved(supernet, objectives, constraints)
    strategies.create("random", supernet.space, wanted, constraints=limits)
    if warm_start:
        telling(wanted)
    if quality is not None:
        check_metrics(wanted, metrics_of_original(supernet, quality))


def check_size(supernet: Supernet, size_mb: float) -> None:
    """Raises JointoptError where no sub-network is as small as what a config chooses."""
    size, space = (lambda genomes: supernet.cost_columns(genomes)["size"]), supernet.space
    least = float(size(descended(space, size, space.smallest)[None])[0]) / 1e6
    if least > size_mb:
        raise JointoptError(f"choose.size_mb: found {size_mb}; allowed: from {least}, as the smallest sub-network has")


def _objectives(supernet: Supernet, objectives: Sequence[Any], known: Mapping[str, float]) -> list[Objective]:
    if not isinstance(objectives, list | tuple) or not objectives:
        raise JointoptError(f"objectives: found {objectives!r}; allowed: a list of one or more: [{{'mine': 'max'}}]")
    found = [named(objective) for objective in objectives]
    if len({objective.name for objective in found}) < len(found):
        raise JointoptError(f"objectives: found one twice in {', '.join(o.name for o in found)}")
    for objective in found:
        # Such a cost would be planned by its function, and recorded, limited and chosen by what the super-network says.
        if objective.compute is not None and objective.name in COSTS:
            raise JointoptError(
                f"objective {objective.name!r}: found a function for a cost that jointopt computes itself; "
                "allowed: another name"
            )

    def column(name: str) -> Column:
        if name in ON_HARDWARE and supernet.latency is None:
            raise JointoptError(
                f"objective {name!r}: found no hardware; allowed: with Supernet(..., latency=Roofline(...))"
            )
        if name not in known and supernet.latency is not None and name in ON_HARDWARE:
            allowed = ", ".join(each for each in known if each in ON_HARDWARE)
            raise JointoptError(
                f"objective {name!r}: {supernet.latency.source} has no figure for it; allowed: {allowed}"
            )
        if name not in known:
            raise JointoptError(f"objective {name!r}: found no cache in this model; allowed costs: {', '.join(known)}")
        return lambda genomes: supernet.cost_columns(genomes)[name]

    return [replace(o, compute=column(o.name)) if o.name in COSTS and o.compute is None else o for o in found]


def _constraints(
    supernet: Supernet, objectives: Sequence[Objective], given: Mapping[str, str], costs: Mapping[str, float]
) -> list[Constraint]:
    """Raises JointoptError for what is neither a cost nor a measured objective."""
    if not isinstance(given, Mapping):
        raise JointoptError(f"constraints: found {given!r}; allowed: a mapping such as {{size_mb: '<= 20'}}")
    own = {o.name: o.compute for o in objectives if o.name not in costs}

    def column(name: str, unit: float) -> Column:
        return lambda genomes: supernet.cost_columns(genomes)[name] / unit

    found = []
    for name, text in given.items():
        cost, unit = cost_and_unit(name)
        if cost not in costs and name not in own:
            allowed = ["size_mb", *costs, *own]
            meant = "" if name in ON_HARDWARE else did_you_mean(name, [*allowed, *ON_HARDWARE])
            raise JointoptError(f"constraints: found {name!r}{meant}; allowed: {', '.join(allowed)}")
        compute = column(cost, unit) if cost in costs else own[name]
        found.append(constraint(name, text, compute))
    latency = supernet.latency
    if latency is not None:
        # What does not fit into the memory is no choice.
        least, most = _peak_memory(supernet)
        if least > latency.capacity:
            raise JointoptError(
                f"latency: the smallest sub-network takes {least / 1e9:.4g} GB, {latency.source} has "
                f"{latency.capacity / 1e9:.4g} GB; allowed: more devices, a smaller batch or context"
            )
        if max(most, costs["peak_memory"]) > latency.capacity:
            found.append(Constraint("peak_memory", latency.capacity, "<=", column("peak_memory", 1.0)))
    return found


def _peak_memory(supernet: Supernet) -> tuple[float, float]:
    """The least and the most of any sub-network: of both ends, with caches of each kind, as inputs that are cached can
    take more than keys and values."""
    space = supernet.space
    caches = np.array([is_cache(gene.name) for gene in space.genes])
    kinds = range(int(space.sizes[caches].max(initial=1)))
    ends = [
        np.where(caches, np.minimum(kind, space.sizes - 1), end)
        for end in (space.smallest, space.largest)
        for kind in kinds
    ]
    found = supernet.cost_columns(space.canonical(np.array(ends)))["peak_memory"]
    return float(found.min()), float(found.max())


def metrics_of_original(supernet: Supernet, quality: Quality) -> dict[str, float]:
    """Metrics of the model as it was given. What the user's function raises here is raised."""
    with supernet.original() as model:
        return measured(quality, model)


def check_metrics(objectives: Sequence[Objective], metrics: Mapping[str, float]) -> None:
    """Raises JointoptError for an objective that is neither among the metrics of a quality function nor computed, or
    is both."""
    for objective in objectives:
        if objective.compute is not None and objective.name in metrics and objective.name not in COSTS:
            raise JointoptError(
                f"objective {objective.name!r}: found a function for what the quality function returns; "
                "allowed: another name"
            )
        if objective.compute is None and objective.name not in metrics:
            returned = [name for name in metrics if name not in COSTS]
            such = f"; allowed: such as {{{returned[0]!r}: 'max'}}" if returned else ""
            raise JointoptError(
                f"objective {objective.name!r}: the quality function returns {', '.join(returned)}{such}"
            )
