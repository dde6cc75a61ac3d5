"""One study on many devices: its evaluations with the times that they would take there, their front, and a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jointopt.objectives import ON_HARDWARE, Objective
from jointopt.report.figures import BLUE, GRAY, GREEN, ORANGE, step, style
from jointopt.report.quantities import label, scale, time_source, written
from jointopt.report.shown import escaped
from jointopt.study.choice import best_of, front_of, keeping_to
from jointopt.study.study import Study
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.cost.operators import LatencyModel
    from jointopt.supernet.supernet import Supernet

KNEE = MappingProxyType({"knee": True})


@dataclass(frozen=True)
class OnDevice:
    """A study's sub-networks on a device.

    Attributes:
        name: as it was asked for.
        source: where its times come from, with the batch and context that they are of.
        objectives: those of the study, and where none of them is a time, the device's latency: of language models that
            of one more token.
        measures: the device's costs, the time that is an objective first.
        rows: all evaluations that fit into its memory, with the device's costs.
        front: those that are not dominated in the objectives, fast ones first.
        chosen: genome that fits the wish, of what keeps to the study's constraints but those of the run's own
            hardware; None where nothing does.
        wish: what was chosen by, in words.
        unmet: what nothing keeps to, and what comes closest; "" where something is chosen.
        original: quality and costs of the original there; its quality alone where it does not fit.
    """

    name: str
    source: str
    objectives: tuple[Objective, ...]
    measures: tuple[str, ...]
    rows: pd.DataFrame
    front: pd.DataFrame
    chosen: tuple[int, ...] | None
    wish: str
    unmet: str
    original: Mapping[str, float]


def on_device(
    study: Study, supernet: Supernet, name: str, model: LatencyModel, wish: Mapping[str, Any] = KNEE
) -> OnDevice:
    """Puts a study on a device.

    Args:
        supernet: of the study's model and space, with its order of blocks; its weights are not looked at.
        wish: a keyword of `Study.best`, by which the device's choice is made. With `drop` it is the least of the
            device's first measure, as a rule the fastest, in place of the smallest.

    Raises:
        JointoptError: no evaluation, or none that fits into the device's memory.
    """
    rows = study.succeeded()
    if rows.empty:
        raise JointoptError("report: the study has no evaluation yet")
    columns = supernet.costs_by(model).columns(np.array(rows["genome"].tolist(), dtype=np.int64))
    rows = rows.assign(**columns)
    fits = rows["peak_memory"] <= model.capacity
    if not fits.any():
        raise JointoptError(
            f"device {name!r}: the smallest that was evaluated takes {rows['peak_memory'].min() / 1e9:.4g} GB; "
            f"{model.source} has {model.capacity / 1e9:.4g} GB"
        )
    rows = rows[fits]
    times = [name for name in ("decode_latency", "latency", "energy", "decode_energy") if name in columns]
    asked = next((o.name for o in study.objectives if o.name in times), None)
    first = asked or times[0]
    wanted = study.objectives if asked else (*study.objectives, Objective(first, "min"))
    measures = (first, *(name for name in times[:3] if name != first), "peak_memory")
    front = front_of(rows, wanted).sort_values(first)
    chosen, unmet = None, ""
    try:
        kept = keeping_to(rows, [each for each in study.constraints if each.name not in ON_HARDWARE])
        # Sizes are the same on every device: what may be lost is given up for what is not.
        ranked = [each for each in wanted if "drop" not in wish or each.name in (study.quality.name, first)]
        original = study.original.get(study.quality.name)
        chosen = tuple(best_of(kept, ranked, study.quality, original, exact=[first], **wish).tolist())
    except JointoptError as error:  # the front is there all the same
        unmet = str(error)
    known = {name: v for name, v in study.original.items() if name not in ON_HARDWARE}
    there = supernet.original_costs(model)
    if there["peak_memory"] <= model.capacity:
        known |= there
    source = time_source(model.described())
    told = _worded(wish, first, study.quality)
    return OnDevice(name, source, wanted, measures, rows, front, chosen, told, unmet, known)


def _worded(wish: Mapping[str, Any], first: str, quality: Objective) -> str:
    if "size_mb" in wish:
        return f"the best at or under {wish['size_mb']:g} MB"
    if "drop" in wish:
        return f"the least {first} whose {quality.name} is at most {wish['drop']:g} worse than the original's"
    return "the knee"


def device_figure(study: Study, on: OnDevice) -> go.Figure:
    """All evaluations in quality and the device's first measure, the front, the original, and what is chosen there."""
    across, up = on.measures[0], study.quality.name
    figure = go.Figure()
    original = pd.DataFrame([{"number": "the original", **on.original}])
    picked = on.rows[on.rows["genome"] == on.chosen]
    line = "lines+markers" if len(on.objectives) == 2 else "markers"
    shape = step(next(objective for objective in on.objectives if objective.name == across))
    for rows, name, mode, marker in (
        (on.rows, f"evaluated ({len(on.rows)})", "markers", {"color": GRAY, "size": 7}),
        (on.front, f"front ({len(on.front)})", line, {"color": BLUE, "size": 9}),
        (original, "the original", "markers", {"color": GREEN, "size": 14, "symbol": "star"}),
        (picked, on.wish, "markers", {"color": "rgba(0,0,0,0)", "size": 18, "line": {"color": ORANGE, "width": 3}}),
    ):
        if len(rows) and across in rows and up in rows:
            told = [
                f"<b>{row['number']}</b><br>{escaped(up)}: {written(up, row[up])}<br>"
                f"{label(across)}: {row[across] / scale(across):,.4g}"
                for row in rows.to_dict("records")
            ]
            figure.add_scatter(
                x=rows[across] / scale(across), y=rows[up] / scale(up), name=name, mode=mode, marker=marker,
                text=told, hovertemplate="%{text}<extra></extra>", line={"color": BLUE, "width": 1.5, "shape": shape},
            )  # fmt: skip
    style(figure, label(across), label(up), height=420)
    return figure
