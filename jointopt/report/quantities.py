"""How a metric or a cost is named, scaled and written wherever someone reads it. MB are 10^6 bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from jointopt.objectives import QUANTITIES, Objective


def scale(name: str) -> float:
    """What a value is divided by before it is shown."""
    return QUANTITIES[name].scale if name in QUANTITIES else 1.0


def label(name: str) -> str:
    """The quantity with its unit."""
    return QUANTITIES[name].label or name if name in QUANTITIES else name


def written(name: str, value: float) -> str:
    """A value with its unit, if it has one, and four significant digits: "20.31 MB"."""
    if value != value:
        return "-"
    unit = QUANTITIES[name].unit if name in QUANTITIES else ""
    return f"{value / scale(name):,.4g} {unit}".rstrip()


def time_source(given: Mapping[str, Any]) -> str:
    """By what times, energies and memory are told, of a model of latency as it describes itself."""
    context = f", context {given['context']}" if given.get("context") else ""
    return f"{given['source']}, batch {given['batch']}{context}"


def counted(genomes: int) -> str:
    """How many genomes: all digits below ten million, else two of them ("1.9e+16"); a float cannot hold every count."""
    return f"{genomes:,}" if genomes < 10**7 else f"{Decimal(genomes):.1e}"


def axes(objectives: Sequence[Objective], measured: Sequence[Objective]) -> list[tuple[Objective, Objective]]:
    """The pairs to draw the front in, (across, up), so that each objective is in one: each cost against the first
    measured objective, size first, and the other measured ones against that cost; where there are no costs, or nothing
    else, all against the first. None of one objective."""
    costs = sorted((o for o in objectives if o not in measured), key=lambda o: o.name != "size")
    if not costs or not measured:
        return [(each, objectives[0]) for each in objectives[1:]]
    return [(cost, measured[0]) for cost in costs] + [(costs[0], each) for each in measured[1:]]
