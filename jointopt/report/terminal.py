"""Tables for the terminal: the front of a study, the genes of a space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from jointopt.objectives import COSTS
from jointopt.report.devices import OnDevice
from jointopt.report.quantities import label, on_unseen, scale
from jointopt.study.rescoring import rescored, rescored_finished
from jointopt.study.study import Study
from search_spaces.space import SearchSpace

ROWS = 30
"""Points of a front that are listed at most; a longer one is thinned out evenly."""


def front_table(study: Study, chosen: Sequence[int] | np.ndarray | None = None) -> Table:
    """The front, from small to large, with the original and the chosen point; metrics on unseen data where there are
    any; how many evaluations failed, and the most frequent reason."""
    names = [objective.name for objective in study.objectives]
    front = study.front()
    costs = [name for name in names if name in COSTS]
    if len(front):
        front = front.sort_values(costs[0] if costs else names[-1])
    picked = None if chosen is None else tuple(map(int, chosen))
    rows = front.to_dict("records")
    thinned = len(rows) > ROWS
    if thinned:
        at = set(np.linspace(0, len(rows) - 1, ROWS).round().astype(int).tolist())
        rows = [row for index, row in enumerate(rows) if index in at or row["genome"] == picked]
    table = Table(
        title=f"front: {len(front)} of {len(study)} evaluations" + (f", {len(rows)} shown" if thinned else "")
    )
    table.add_column("evaluation", justify="right")
    for name in names:
        table.add_column(Text(label(name)), justify="right")
    unseen = rescored(study)
    again = [objective.name for objective in study.measured] if unseen else []
    for name in again:
        table.add_column(Text(f"{label(name)}, unseen data"), justify="right")
    for row in rows:
        mark = " *" if row["genome"] == picked else ""
        values = [_shown(row, name) for name in names] + [on_unseen(unseen.get(row["genome"]), n) for n in again]
        table.add_row(f"{row['number']}{mark}", *values, style="bold" if mark else None)
    if original := study.original:
        table.add_section()
        values = [_shown(original, name) for name in names] + [on_unseen(unseen.get(None), n) for n in again]
        table.add_row("the original", *values)
    told = ["* chosen"] if any(row["genome"] == picked for row in rows) else []
    if reasons := Counter(study.failed()["failed"]):
        reason, count = reasons.most_common(1)[0]
        told.append(f"failed evaluations: {reasons.total()}, {count} of them with {reason}")
    table.caption = Text("\n".join(told)) if told else None
    return table


def device_table(on: OnDevice) -> Table:
    """The front of a study on a device, from fast to slow."""
    objectives = [objective.name for objective in on.objectives]
    names = list(dict.fromkeys([*objectives, *on.measures, "size"]))
    table = Table(title=Text(f"{on.source}: front of {', '.join(objectives[:-1])} and {objectives[-1]}"))
    table.add_column("evaluation", justify="right")
    for name in names:
        table.add_column(Text(label(name)), justify="right")
    for row in on.front.to_dict("records"):
        mark = " *" if row["genome"] == on.chosen else ""
        values = (_shown(row, name) for name in names)
        table.add_row(f"{row['number']}{mark}", *values, style="bold" if mark else None)
    table.add_section()
    table.add_row("the original", *(_shown(on.original, name) for name in names))
    table.caption = Text(on.unmet or f"* {on.wish}")
    return table


def finished_table(
    study: Study, chosen: Sequence[int] | np.ndarray | None = None, rounding: str | None = None
) -> Table:
    """Sub-networks that were finished: what they measured before and after; metrics on unseen data of those that were
    exported. Sizes stay what they were. The `chosen` one, finished by `rounding`, is marked."""
    names = [objective.name for objective in study.measured]
    picked = None if chosen is None else tuple(map(int, chosen))
    numbers = {row["genome"]: row for row in study.evaluations().to_dict("records")}
    unseen = rescored_finished(study)
    again = [f"{label(name)}, unseen data" for name in names] if unseen else []
    table = Table(title="finished")
    for text in ("evaluation", "rounding", label("size"), *(label(name) for name in names), *again):
        table.add_column(Text(text), justify="right")
    for record in study.finished():
        before = numbers[tuple(record["genome"])]
        mark = " *" if (before["genome"], record["rounding"]) == (picked, rounding) else ""
        values = [f"{_shown(before, name)} -> {_shown(record['metrics'], name)}" for name in names]
        if unseen:
            values += [on_unseen(unseen.get((before["genome"], record["rounding"])), name) for name in names]
        size = _shown(record["metrics"], "size")
        table.add_row(f"{before['number']}{mark}", record["rounding"], size, *values, style="bold" if mark else None)
    return table


def _shown(values: Mapping[str, float], name: str) -> str:
    return f"{values[name] / scale(name):,.5g}" if name in values else ""


def space_table(space: SearchSpace) -> Table:
    """Every gene with its choices, and what it requires in order to matter."""
    table = Table(title=f"{len(space)} genes")
    for name in ("gene", "choices", "requires"):
        table.add_column(name, overflow="fold")
    for gene in space.genes:
        requires = [f"{name} {_listed(allowed)}" for name, allowed in gene.requires.items()]
        table.add_row(Text(gene.name), Text(_listed(gene.choices)), Text("; ".join(requires)))
    return table


def _listed(choices: Sequence[object]) -> str:
    return ", ".join(map(str, choices))


def extremes_table(costs: Mapping[str, Mapping[str, float]]) -> Table:
    """Name of a sub-network -> its costs, one row each."""
    table = Table()
    table.add_column("sub-network")
    there = [name for name in COSTS if any(name in values for values in costs.values())]
    for name in there:
        table.add_column(Text(label(name)), justify="right")
    for name, values in costs.items():
        table.add_row(name, *(_shown(values, each) for each in there))
    return table
