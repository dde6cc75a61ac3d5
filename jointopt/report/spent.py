"""Where a sub-network spends time and bytes, block by block and by kind of operator, beside the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from jointopt.report.figures import FORMATS, style
from jointopt.report.quantities import label, scale

Spent = Sequence[Mapping[str, Any]]
"""`Supernet.breakdown`."""


def spent_figure(chosen: Spent, original: Spent) -> go.Figure:
    """Two rows of bars, one for each block: time (MACs where there is none), and stored bytes."""
    first = "latency" if "latency" in chosen[0] else "macs"
    places = list(dict.fromkeys(_place(record) for record in original))
    kinds = [kind for kind in dict.fromkeys(record["kind"] for record in original) if kind != "other"] + ["other"]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for row, measure in enumerate((first, "size"), 1):
        whole = _sums(original, measure)
        grey = {"color": "rgba(0,0,0,0.04)", "line": {"color": "#c9ced6", "width": 1}}
        figure.add_bar(
            x=places, y=[sum(whole.get((place, kind), 0.0) for kind in kinds) for place in places], marker=grey,
            name="the original", showlegend=row == 1, row=row, col=1,
        )  # fmt: skip
        found, base = _sums(chosen, measure), [0.0] * len(places)
        for kind, color in zip(kinds, FORMATS * 2, strict=False):
            values = [found.get((place, kind), 0.0) for place in places]
            if any(values):
                figure.add_bar(
                    x=places, y=values, base=list(base), marker={"color": color}, name=kind, legendgroup=kind,
                    showlegend=row == 1 or not any(_sums(chosen, first).get((p, kind)) for p in places), row=row, col=1,
                )  # fmt: skip
            base = [below + value for below, value in zip(base, values, strict=True)]
        figure.update_yaxes(title_text=label(measure), row=row, col=1)
    style(figure, None, None, height=480)
    figure.update_layout(barmode="overlay", bargap=0.15)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=places)
    return figure


def _place(record: Mapping[str, Any]) -> str:
    return str(record["block"] or "outside blocks")


def _sums(records: Spent, measure: str) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for record in records:
        key = (_place(record), record["kind"])
        found[key] = found.get(key, 0.0) + record[measure] / scale(measure)
    return found
