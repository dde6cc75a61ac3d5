"""The figures of the report, each from a study's own records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.stats import spearmanr

from jointopt.objectives import Objective, is_column
from jointopt.report.quantities import label, scale, written
from jointopt.report.shown import Shown, escaped
from jointopt.study.study import Study

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, GRAY, INK = "#0072b2", "#d55e00", "#009e73", "#b4bac2", "#24292f"
FORMATS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f", "#332288", "#882255")
LOG_FROM = 20.0
"""Ratio of largest to smallest value from which an axis is logarithmic."""
LOG_TICKS = [float(f"{digit}e{power}") for power in range(-9, 13) for digit in (1, 2, 5)]
"""Where a logarithmic axis has its ticks, each written out: plotly would label 0.2 between 0.1 and 1 as a bare 2."""
LOG_LABELS = [f"{tick:,.15g}" if 1e-4 <= tick < 1e7 else f"{tick:.0e}" for tick in LOG_TICKS]

Layers = Sequence[Mapping[str, Any]]


def front_figure(shown: Shown, across: Objective, up: Objective, chosen: Sequence[int] | None) -> go.Figure:
    """All evaluations in two of the objectives: the front, the original, and the chosen point. Each point carries
    its evaluation's number as customdata."""
    study, frame, front = shown.study, shown.succeeded, shown.front
    behind = frame[~frame["number"].isin(front["number"])]
    figure = go.Figure()
    _add_points(figure, shown, behind, across, up, f"evaluated ({len(frame)})", {"color": GRAY, "size": 7})
    if len(front):
        ordered = front.sort_values(across.name)
        line = "lines+markers" if len(study.objectives) == 2 else "markers"
        marker = {"color": BLUE, "size": 9, "line": {"color": "white", "width": 1}}
        _add_points(figure, shown, ordered, across, up, f"front ({len(front)})", marker, line)
    original = study.original
    if across.name in original and up.name in original:
        row = pd.DataFrame([{"number": -1, **original}])
        marker = {"color": GREEN, "size": 14, "symbol": "star"}
        _add_points(figure, shown, row, across, up, "the original", marker)
    if chosen is not None and len(frame):
        picked = frame[frame["genome"] == tuple(chosen)].assign(**finished_metrics(study, chosen))
        marker = {"color": "rgba(0,0,0,0)", "size": 18, "line": {"color": ORANGE, "width": 3}}
        _add_points(figure, shown, picked, across, up, "chosen", marker)
    style(figure, _title(across), _title(up), height=470)
    for axis, objective in (("xaxis", across), ("yaxis", up)):
        if _spans(frame, original, objective):
            figure.layout[axis].update(type="log", tickmode="array", tickvals=LOG_TICKS, ticktext=LOG_LABELS)
    return figure


def finished_metrics(study: Study, chosen: Sequence[int] | np.ndarray | None) -> dict[str, float]:
    """What the chosen sub-network has as it was exported; nothing where it was not finished."""
    if chosen is None:
        return {}
    return study.finished_metrics(chosen, study.fact("choice", {}).get("rounding")) or {}


def _add_points(
    figure: go.Figure,
    shown: Shown,
    rows: pd.DataFrame,
    across: Objective,
    up: Objective,
    name: str,
    marker: dict,
    mode: str = "markers",
) -> None:
    """Those that a line joins are in the order of `across`, from small to large."""
    if not len(rows):
        return
    figure.add_trace(
        go.Scatter(
            x=rows[across.name] / scale(across.name),
            y=rows[up.name] / scale(up.name),
            customdata=rows["number"],
            text=[_hover(shown, row, name) for row in rows.to_dict("records")],
            hovertemplate="%{text}<extra></extra>",
            name=escaped(name),
            mode=mode,
            marker=marker,
            line={"color": BLUE, "width": 1.5, "shape": step(across)},
        )
    )


def step(across: Objective) -> str:
    """The shape of a front's line, of points from small to large: each corner is worse than the points that it joins,
    whatever the other objective's direction, for a better one would be a claim that nothing was measured for."""
    return "hv" if across.direction == "min" else "vh"


def _hover(shown: Shown, row: Mapping[str, Any], name: str) -> str:
    lines = [f"<b>evaluation {row['number']}</b>" if row["number"] >= 0 else f"<b>{escaped(name)}</b>"]
    for key, value in row.items():
        if not is_column(str(key)) and isinstance(value, int | float):
            lines.append(f"{escaped(str(key))}: {written(str(key), value)}")
    return "<br>".join([*lines, *shown.summaries.get(row["number"], ())])


def _title(objective: Objective) -> str:
    return f"{label(objective.name)} ({'less' if objective.direction == 'min' else 'more'} is better)"


def _spans(frame: pd.DataFrame, original: Mapping[str, float], objective: Objective) -> bool:
    """Whether a few bad points would press all others flat, and a logarithm has a place for each: the original's KL
    divergence from itself has none."""
    name = objective.name
    values = frame[name].dropna().to_numpy(dtype=float) if name in frame else np.empty(0)
    least = min([*values, *([original[name]] if name in original else ())], default=0.0)
    pressed = len(values) > 1 and bool(values.max() > LOG_FROM * values.min())
    return objective.direction == "min" and least > 0 and pressed


def layers_figure(layers: Layers, full: Layers | None) -> go.Figure:
    """Each layer of the chosen sub-network: the share of its weights that stays, and their bits, by scheme.

    Args:
        layers: `Supernet.layout` of the chosen genome.
        full: the same of the whole model, whose layers that are gone are shown as empty places.
    """
    kept = {record["layer"]: record for record in layers}
    places = list(full or layers)
    whole = {record["layer"]: record["rows"] * record["columns"] for record in places}
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    names = [escaped(str(record["layer"])) for record in places]
    empty = {"color": "rgba(0,0,0,0.03)", "line": {"color": "#c9ced6", "width": 1}}
    figure.add_bar(
        x=names, y=[100.0] * len(places), marker=empty, hoverinfo="skip", name="the whole model", row=1, col=1
    )
    schemes = list(dict.fromkeys(record["scheme"] for record in layers))
    for scheme, color in zip(schemes, FORMATS * (len(schemes) // len(FORMATS) + 1), strict=False):
        at = [place["layer"] for place in places if kept.get(place["layer"], {}).get("scheme") == scheme]
        shares = [100.0 * kept[path]["rows"] * kept[path]["columns"] / whole[path] for path in at]
        text = [_layer_text(kept[path], share) for path, share in zip(at, shares, strict=True)]
        common: dict[str, Any] = {"x": [escaped(path) for path in at], "marker": {"color": color}, "hovertext": text}
        common |= {"hoverinfo": "text", "name": escaped(str(scheme)), "legendgroup": str(scheme)}
        figure.add_bar(y=shares, row=1, col=1, **common)
        figure.add_bar(y=[kept[path]["bits"] for path in at], row=2, col=1, showlegend=False, **common)
    style(figure, None, None, height=480)
    figure.update_layout(barmode="overlay", bargap=0.12)
    figure.update_yaxes(title_text="weights kept (%)", range=[0, 104], row=1, col=1)
    figure.update_yaxes(title_text="bits a weight", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, tickfont={"size": 9})
    figure.update_xaxes(title_text="layer, in the order of the model", row=2, col=1)
    _name_blocks(figure, places, names)
    return figure


def _layer_text(record: Mapping[str, Any], share: float) -> str:
    return (
        f"<b>{escaped(str(record['layer']))}</b><br>{record['kind']}, {record['rows']} x {record['columns']} "
        f"({share:.0f}% of its weights)<br>{escaped(str(record['scheme']))}, {record['bits']:.4g} bits a weight"
    )


def _name_blocks(figure: go.Figure, places: Layers, names: list[str]) -> None:
    """One tick for each block, in its middle; other layers by the last part of their path."""
    members: dict[str, list[int]] = {}
    for index, record in enumerate(places):
        members.setdefault(str(record["block"] or record["layer"].rpartition(".")[2]), []).append(index)
    ticks = [names[indices[len(indices) // 2]] for indices in members.values()]
    figure.update_xaxes(tickmode="array", tickvals=ticks, ticktext=[escaped(name) for name in members])


def predictions_figure(shown: Shown) -> go.Figure | None:
    """For each measured objective, what was predicted before the evaluation against what it gave; None where nothing
    was predicted."""
    frame, compared = shown.frame, []
    for objective in shown.study.measured:
        column = f"predicted_{objective.name}"
        if column not in frame or objective.name not in frame:
            continue
        both = frame[[column, objective.name, "number"]].dropna()
        if len(both) > 2 and not np.allclose(both[column], both[objective.name], rtol=1e-12, atol=0):
            compared.append((objective, both))
    if not compared:
        return None
    titles = [
        f"{escaped(objective.name)}: rank correlation {_rank_correlation(both.iloc[:, 0], both.iloc[:, 1])} "
        f"(Spearman, {len(both)} evaluations)"
        for objective, both in compared
    ]
    figure = make_subplots(rows=1, cols=len(compared), subplot_titles=titles)
    for index, (objective, both) in enumerate(compared, 1):
        ends = [float(both.iloc[:, :2].min().min()), float(both.iloc[:, :2].max().max())]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": GRAY, "dash": "dot"}, hoverinfo="skip", row=1, col=index
        )
        figure.add_scatter(
            x=both.iloc[:, 0],
            y=both.iloc[:, 1],
            mode="markers",
            marker={"color": both["number"], "colorscale": "Blues", "cmin": -len(frame) / 3, "size": 7},
            customdata=both["number"],
            hovertemplate="evaluation %{customdata}<br>predicted %{x:.4g}<br>measured %{y:.4g}<extra></extra>",
            row=1,
            col=index,
        )
        figure.update_xaxes(title_text=escaped(f"{label(objective.name)}, predicted"), row=1, col=index)
        figure.update_yaxes(title_text=escaped(f"{label(objective.name)}, measured"), row=1, col=index)
    style(figure, None, None, height=400)
    figure.update_layout(showlegend=False, margin_t=50)
    return figure


def _rank_correlation(predicted: pd.Series, measured: pd.Series) -> str:
    value = spearmanr(predicted, measured).statistic if predicted.nunique() > 1 and measured.nunique() > 1 else np.nan
    return "undefined" if np.isnan(value) else f"{value:.2f}"


def hypervolume_figure(study: Study) -> go.Figure | None:
    """Hypervolume after each evaluation, in the units of the axes; None before a reference point is known."""
    if study.reference_point() is None:
        return None
    history = study.hypervolume_history() / np.prod([scale(objective.name) for objective in study.objectives])
    figure = go.Figure(go.Scatter(x=np.arange(1, len(history) + 1), y=history, line={"color": BLUE, "shape": "hv"}))
    figure.update_traces(hovertemplate="after %{x} evaluations<br>%{y:.5g}<extra></extra>")
    style(figure, "evaluations", "hypervolume", height=320)
    return figure


def style(figure: go.Figure, across: str | None, up: str | None, height: int) -> None:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"bgcolor": "white", "font": {"color": INK}, "align": "left"},
        hovermode="closest",
    )
    if across is not None:
        figure.update_xaxes(title_text=escaped(across))
    if up is not None:
        figure.update_yaxes(title_text=escaped(up))
