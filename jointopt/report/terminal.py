"""Tables for the terminal: the front of a study, the genes of a space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from jointopt.objectives import COSTS
from jointopt.report.devices import OnDevice
from jointopt.report.quantities import label
from jointopt.report.tables import cell, finished_rows, front_rows
from jointopt.study.study import Study
from search_spaces.space import SearchSpace

ROWS = 30
"""Points of a front that are listed at most; a longer one is thinned out evenly."""


def front_table(study: Study, chosen: Sequence[int] | np.ndarray | None = None) -> Table:
    """`front_rows`, thinned out; how many evaluations failed, and the most frequent reason."""
    front = study.front()
    titles, rows, marked = front_rows(study, front, _genome(chosen))
    listed = list(range(len(front)))
    if thinned := len(front) > ROWS:
        kept = {*np.linspace(0, len(front) - 1, ROWS).round().astype(int).tolist(), marked}
        listed = [at for at in listed if at in kept]
    title = f"front: {len(front)} of {len(study)} evaluations" + (f", {len(listed)} shown" if thinned else "")
    mark = None if marked is None else listed.index(marked)
    table = _table(title, titles, [rows[at] for at in listed], mark)
    _add_original(table, rows[len(front) :])
    told = [] if marked is None else ["* chosen"]
    if reasons := Counter(study.failed()["failed"]):
        reason, count = reasons.most_common(1)[0]
        told.append(f"failed evaluations: {reasons.total()}, {count} of them with {reason}")
    table.caption = Text("\n".join(told)) if told else None
    return table


def device_table(on: OnDevice) -> Table:
    """The front of a study on a device, from fast to slow."""
    objectives = [objective.name for objective in on.objectives]
    names = list(dict.fromkeys([*objectives, *on.measures, "size"]))
    records = on.front.to_dict("records")
    rows = [[str(record["number"]), *(cell(record, name) for name in names)] for record in records]
    marked = next((at for at, record in enumerate(records) if record["genome"] == on.chosen), None)
    title = f"{on.source}: front of {', '.join(objectives[:-1])} and {objectives[-1]}"
    table = _table(title, ["evaluation", *map(label, names)], rows, marked)
    _add_original(table, [["the original", *(cell(on.original, name) for name in names)]])
    table.caption = Text(on.unmet or f"* {on.wish}")
    return table


def finished_table(
    study: Study, chosen: Sequence[int] | np.ndarray | None = None, rounding: str | None = None
) -> Table:
    """`finished_rows`; the `chosen` one, finished by `rounding`, is marked."""
    return _table("finished", *finished_rows(study, study.evaluations(), _genome(chosen), rounding))


def _genome(chosen: Sequence[int] | np.ndarray | None) -> tuple[int, ...] | None:
    return None if chosen is None else tuple(map(int, chosen))


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None) -> Table:
    table = Table(title=Text(title, "table.title"))
    for text in titles:
        table.add_column(Text(text), justify="right", overflow="fold")  # without its exponent a number is another
    for at, (first, *cells) in enumerate(rows):
        told, style = (f"{first} *", "bold") if at == marked else (first, None)
        table.add_row(*map(Text, (told, *cells)), style=style)
    return table


def _add_original(table: Table, rows: Sequence[Sequence[str]]) -> None:
    for cells in rows:
        table.add_section()
        table.add_row(*map(Text, cells))


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
        table.add_column(Text(label(name)), justify="right", overflow="fold")
    for name, values in costs.items():
        table.add_row(name, *(cell(values, each) for each in there))
    return table
