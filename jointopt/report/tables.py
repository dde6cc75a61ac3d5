"""The rows of a report's tables, which the terminal and the page show alike. Cells are plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from jointopt.objectives import COSTS
from jointopt.report.quantities import label, scale
from jointopt.study.rescoring import rescored, rescored_finished
from jointopt.study.study import Study

Rows = tuple[list[str], list[list[str]], int | None]
"""Titles, rows of cells, and which of the rows is that of the chosen sub-network; None where none is."""


def cell(values: Mapping[str, float], name: str) -> str:
    """A value in the unit of its label, to six significant digits; "-" where there is none."""
    value = values.get(name, math.nan)
    return "-" if value != value else f"{value / scale(name):,.6g}"


def front_rows(study: Study, front: pd.DataFrame, picked: tuple[int, ...] | None) -> Rows:
    """The front from small to large, and after it the original where it was measured; metrics on unseen data where
    there are any.

    Args:
        front: as `Study.front` gives it.
        picked: the chosen genome.
    """
    names = [objective.name for objective in study.objectives]
    unseen = rescored(study)
    again = [objective.name for objective in study.measured] if unseen else []
    if len(front):
        front = front.sort_values(next((name for name in names if name in COSTS), names[-1]))
    records = front.to_dict("records")
    shown = [(str(record["number"]), record, record["genome"]) for record in records]
    if original := study.original:
        shown.append(("the original", original, None))
    rows = [
        [first, *(cell(values, name) for name in names), *(_on_unseen(unseen.get(genome), name) for name in again)]
        for first, values, genome in shown
    ]
    marked = next((at for at, record in enumerate(records) if record["genome"] == picked), None)
    return ["evaluation", *map(label, names), *(f"{label(name)}, unseen data" for name in again)], rows, marked


def finished_rows(
    study: Study, evaluations: pd.DataFrame, picked: tuple[int, ...] | None, rounding: str | None
) -> Rows:
    """Sub-networks that were finished: what they measured before and after; metrics on unseen data of those that were
    exported. Sizes stay what they were.

    Args:
        evaluations: as `Study.evaluations` gives them.
        picked, rounding: the chosen genome, and how it was finished.
    """
    names = [objective.name for objective in study.measured]
    evaluated = {record["genome"]: record for record in evaluations.to_dict("records")}
    unseen, finished = rescored_finished(study), study.finished()
    rows = []
    for record in finished:
        before, after = evaluated[tuple(record["genome"])], record["metrics"]
        row = [str(before["number"]), record["rounding"], cell(after, "size")]
        row += [f"{cell(before, name)} -> {cell(after, name)}" for name in names]
        if unseen:
            row += [_on_unseen(unseen.get((before["genome"], record["rounding"])), name) for name in names]
        rows.append(row)
    titles = ["evaluation", "rounding", label("size"), *map(label, names)]
    titles += [f"{label(name)}, unseen data" for name in names] if unseen else []
    keys = [(tuple(record["genome"]), record["rounding"]) for record in finished]
    return titles, rows, next((at for at, key in enumerate(keys) if key == (picked, rounding)), None)


def _on_unseen(record: Mapping[str, Any] | None, name: str) -> str:
    """A metric on data that the search did not see, with its standard error where it has one: "0.912 ± 0.008"."""
    if record is None:
        return "-"
    error = f" ± {record['errors'][name] / scale(name):.2g}" if name in record["errors"] else ""
    return cell(record["metrics"], name) + error
