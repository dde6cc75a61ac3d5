"""One study on many devices: its evaluations with the times that they would take there, their front, and a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jointopt.objectives import ON_HARDWARE, Objective
from jointopt.report.figures import BLUE, GRAY, GREEN, ORANGE, escaped, step, style
from jointopt.report.quantities import label, scale, time_source, written
from jointopt.study.choice import best_of, front_of, keeping_to
from jointopt.study.study import Study
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.cost.operators import LatencyModel
    from jointopt.supernet.supernet import Supernet


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
        chosen: genome of the front's knee, of what keeps to the study's constraints but those of the run's own
            hardware; None where nothing does.
        unmet: which constraint nothing keeps to, and what comes closest; "" where something is chosen.
        original: quality and costs of the original there; its quality alone where it does not fit.
    """

    name: str
    source: str
    objectives: tuple[Objective, ...]
    measures: tuple[str, ...]
    rows: pd.DataFrame
    front: pd.DataFrame
    chosen: tuple[int, ...] | None
    unmet: str
    original: Mapping[str, float]


def on_device(study: Study, supernet: Supernet, name: str, model: LatencyModel) -> OnDevice:
    """Puts a study on a device.

    Args:
        supernet: of the study's model and space, with its order of blocks; its weights are not looked at.

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
        chosen = tuple(best_of(kept, wanted, study.quality, None, knee=True).tolist())
    except JointoptError as error:  # the front is there all the same
        unmet = str(error)
    original = {name: v for name, v in study.original.items() if name not in ON_HARDWARE}
    there = supernet.original_costs(model)
    if there["peak_memory"] <= model.capacity:
        original |= there
    return OnDevice(name, time_source(model.described()), wanted, measures, rows, front, chosen, unmet, original)


def device_figure(study: Study, on: OnDevice) -> go.Figure:
    """All evaluations in quality and the device's first measure, the front, the original, and the front's knee."""
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
        (picked, "the knee", "markers", {"color": "rgba(0,0,0,0)", "size": 18, "line": {"color": ORANGE, "width": 3}}),
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
