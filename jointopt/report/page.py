"""One HTML page of a study that opens offline: the front, the chosen sub-network, the predictions, the progress."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.io
from plotly.offline import get_plotlyjs

from jointopt.files import write_whole
from jointopt.report.devices import OnDevice, device_figure
from jointopt.report.figures import (
    finished_metrics,
    front_figure,
    hypervolume_figure,
    layers_figure,
    predictions_figure,
)
from jointopt.report.quantities import axes, counted, label, time_source, written
from jointopt.report.shown import Shown
from jointopt.report.spent import spent_figure
from jointopt.report.tables import cell, finished_rows, front_rows
from jointopt.report.template import PAGE, SCRIPT, STYLE
from jointopt.study.differences import flat
from jointopt.study.rescoring import rescored
from jointopt.study.study import Study
from quant.errors import JointoptError


def write_report(study: Study | str | Path, path: str | Path, *, devices: Sequence[OnDevice] = ()) -> Path:
    """Writes the report of a finished or a running study; what it has recorded as its "choice" is marked and drawn.

    Args:
        study: the study, or its file.
        path: the HTML file; one that is there is replaced.
        devices: the study's sub-networks on devices (`report.devices.on_device`), each with its front and its choice.

    Returns:
        The path.

    Raises:
        JointoptError: no such study, a device by its name alone, or the file cannot be written.
    """
    if not isinstance(path, str | Path) or not Path(path).name:
        shown = str(path) if isinstance(path, Path) else path
        raise JointoptError(f"report: found path {shown!r}; allowed: that of an HTML file")
    for each in devices:
        if not isinstance(each, OnDevice):
            raise JointoptError(f"report: found device {each!r}; allowed: what jointopt.report.devices.on_device gives")
    opened = study if isinstance(study, Study) else Study.open(study)
    try:
        html = _page(opened, devices)
    finally:
        if opened is not study:
            opened.close()
    write_whole(Path(path), html, "report")
    return Path(path)


def _page(study: Study, devices: Sequence[OnDevice]) -> str:
    choice = study.fact("choice", {})
    picked = tuple(choice["genome"]) if choice else None
    config = study.config
    heading = str(config.get("model", "Search"))
    shown = Shown(study)
    sections = [
        f"<h1>{escape(heading)}</h1>",
        "<p>Architecture and number formats, searched together. MB are 10<sup>6</sup> bytes.</p>",
        _cards(shown, picked),
        _front_section(shown, picked),
    ]
    if layers := choice.get("layers"):
        sections.append(
            "<h2>The chosen sub-network, layer by layer</h2><p>How much of each layer stays, and in which format; an "
            "empty place is a layer that has left.</p>"
            + _plot(layers_figure(layers, choice.get("full_layers")), "layers")
        )
    if spent := choice.get("spent"):
        sections.append(
            "<h2>Where it spends time and bytes</h2><p>Each block of the chosen sub-network by kind of operator; "
            f"behind it, in grey, the original's.{_time_source(study)}</p>"
            + _plot(spent_figure(spent, choice["full_spent"]), "spent")
        )
    sections += [_device_section(study, each, at) for at, each in enumerate(devices)]
    predictions = predictions_figure(shown)
    if predictions is not None:
        sections.append(
            "<h2>Predicted against measured</h2><p>What the predictor said before each evaluation; darker is later.</p>"
            + _plot(predictions, "predictions")
        )
    sections += [
        _hypervolume_section(study),
        _front_table(shown, picked),
        _finished(shown, picked, choice.get("rounding")),
        _failures(shown),
        _settings(study),
    ]
    record = _record(shown, picked)
    return PAGE.format(
        title=escape(heading),
        style=STYLE,
        plotly=get_plotlyjs(),
        body="\n".join(sections),
        record=json.dumps(record).replace("<", "\\u003c"),
        script=SCRIPT,
    )


def _plot(figure: Any, name: str) -> str:
    unused = ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
    options = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": unused}
    return plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, div_id=name, config=options)


def _cards(shown: Shown, picked: tuple[int, ...] | None) -> str:
    study, frame, failed = shown.study, shown.frame, len(shown.failed)
    cards = [(str(len(frame)), "evaluations" + (f", {failed} of them failed" if failed else ""))]
    cards += [(str(len(shown.front)), "on the front"), (counted(study.space.count()), "genomes in the space")]
    original = study.original
    rows = frame[frame["genome"] == picked] if picked is not None and len(frame) else frame.iloc[:0]
    measured = finished_metrics(study, picked)
    for objective in study.objectives:
        if objective.name in original:
            cards.append(
                (written(objective.name, original[objective.name]), f"{escape(objective.name)} of the original")
            )
        if len(rows):
            value = float(measured.get(objective.name, rows.iloc[0][objective.name]))
            cards.append((written(objective.name, value), f"{escape(objective.name)} of the chosen one"))
    timed = study.fact("measured_latency")
    if timed and picked is not None and timed["genome"] == list(picked):
        cards.append((written("latency", timed["measured"]), "measured of the export, end to end"))
    verified = study.fact("verified")
    if verified:
        cards.append((escape(str(verified)), "export"))
    return (
        '<div class="cards">'
        + "".join(f"<div class=card><b>{b}</b><span>{s}</span></div>" for b, s in cards)
        + "</div>"
    )


def _front_section(shown: Shown, picked: tuple[int, ...] | None) -> str:
    if not len(shown.frame):
        return "<h2>The front</h2><p>No evaluation yet.</p>"
    pairs = axes(shown.study.objectives, shown.study.measured)
    if not pairs:
        return (
            "<h2>The front</h2><p>Of one objective it is the best sub-network, and there is nothing to draw. Choices "
            'other than the largest model\'s are coloured.</p><div class="scroll" id="genome"></div>'
        )
    plots = "".join(_plot(front_figure(shown, x, y, picked), f"front{i}") for i, (x, y) in enumerate(pairs))
    return (
        "<h2>The front</h2><p>Each point is a sub-network that was really measured. Hover over one to see its genome, "
        "click to keep it; choices other than the largest model's are coloured.</p>"
        f'<div class="split front"><div>{plots}</div><div class="scroll" id="genome"></div></div>'
    )


def _time_source(study: Study) -> str:
    """Where times come from, where there are any."""
    given = study.config.get("latency")
    if not given:
        return " Times were not asked for; MACs stand for them."
    return f" Times are by the {escape(time_source(given))}."


def _device_section(study: Study, on: OnDevice, at: int) -> str:
    told = escape(f"Nothing is chosen here: {on.unmet}" if on.unmet else f"Chosen here is {on.wish}")
    return (
        f"<h2>On another device: {escape(on.name)}</h2><p>The {escape(on.source)}: the same evaluations, with the "
        f"times that they would take there. Quality was not measured again. {told}.</p>"
        + _plot(device_figure(study, on), f"device{at}")
    )


def _hypervolume_section(study: Study) -> str:
    figure = hypervolume_figure(study)
    if figure is None:
        return ""
    reference = study.reference_point() or []
    told = ", ".join(
        f"{escape(o.name)} {written(o.name, value)}" for o, value in zip(study.objectives, reference, strict=True)
    )
    return (
        "<h2>Hypervolume</h2><p>How much the front dominates, in the units of this page, from the reference point "
        f"{told}.</p>" + _plot(figure, "hypervolume")
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], marked: int | None = None) -> str:
    """Titles and cells are text; the row at `marked` stands out."""
    head = "".join(f"<th>{escape(text)}</th>" for text in titles)
    lines = [f"<tr>{head}</tr>"] if titles else []
    for at, cells in enumerate(rows):
        kind = ' class="chosen"' if at == marked else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _front_table(shown: Shown, picked: tuple[int, ...] | None) -> str:
    if not len(shown.front):
        return ""
    told = "<p>Unseen data: scored again after the search, which never saw it; ± one standard error.</p>"
    told *= bool(rescored(shown.study))
    return f"<h2>Front, in numbers</h2>{told}{_table(*front_rows(shown.study, shown.front, picked))}"


def _finished(shown: Shown, picked: tuple[int, ...] | None, rounding: str | None) -> str:
    """What was rounded anew after the search, before and after."""
    titles, rows, marked = finished_rows(shown.study, shown.frame, picked, rounding)
    if not rows:
        return ""
    return (
        "<h2>Finished sub-networks</h2><p>Their weights were rounded anew after the search, or trained alone, which is "
        "too slow for it; sizes are what they were. Measured by the search, and finished.</p>"
        + _table(titles, rows, marked)
    )


def _failures(shown: Shown) -> str:
    if not len(shown.failed):
        return ""
    rows = [(str(row.number), str(row.failed)) for row in shown.failed.itertuples()]
    return "<h2>Failed evaluations</h2>" + _table(("evaluation", "reason"), rows)


def _settings(study: Study) -> str:
    settings = [*flat(study.config).items(), *flat(study.fact("software", {}), "software").items()]
    rows = [(key, _told(value)) for key, value in settings]
    return "<h2>Config and versions</h2>" + _table((), rows)


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _record(shown: Shown, picked: tuple[int, ...] | None) -> dict[str, Any]:
    """What the page's script needs to show any genome."""
    space, objectives = shown.study.space, shown.study.objectives
    genes = [{"name": gene.name, "choices": [str(choice) for choice in gene.choices]} for gene in space.genes]
    drawn = np.where(shown.active, shown.genomes, -1).tolist()
    evaluations, first = {}, int(shown.front.iloc[0]["number"]) if len(shown.front) else -1
    for row, genome in zip(shown.frame.to_dict("records"), drawn, strict=True):
        facts = [["generation", str(row["generation"])], ["seconds", f"{row['seconds']:.3g}"]]
        if row["failed"] is not None and row["failed"] == row["failed"]:
            facts.append(["failed", str(row["failed"])])
        known = [o.name for o in objectives if row.get(o.name, np.nan) == row.get(o.name)]
        facts += [[label(name), cell(row, name)] for name in known]
        evaluations[int(row["number"])] = {"genome": genome, "facts": facts}
        if row["genome"] == picked:
            first = int(row["number"])
    return {"genes": genes, "largest": space.largest.tolist(), "evaluations": evaluations, "shown": first}
