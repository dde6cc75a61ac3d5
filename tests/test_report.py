"""The report: one page that opens offline and says what the study says, whatever is in it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jointopt import Gene, JointoptError, Objective, SearchSpace, Study, write_report
from jointopt.report.figures import front_figure, hypervolume_figure, layers_figure, predictions_figure
from jointopt.report.quantities import axes, counted, written
from jointopt.report.shown import Shown
from jointopt.report.template import SCRIPT
from jointopt.report.terminal import ROWS, extremes_table, finished_table, front_table, space_table

OBJECTIVES = [Objective("accuracy", "max"), Objective("size", "min")]
SPACE = SearchSpace(
    [
        Gene("depth", (2, 3, 4)),
        Gene("block3.mlp", (64, 128), requires={"depth": (4,)}),
        *[Gene(f"block{n}.precision", ("W4A16", "W8A8", "none")) for n in range(3)],
    ]
)
ORIGINAL = {"accuracy": 0.95, "size": 90e6, "parameters": 22.5e6}


def make_study(path: Path | None = None, count: int = 20, config: dict | None = None, failures: int = 1) -> Study:
    study = Study.create(path, SPACE, OBJECTIVES, config or {"model": "runs/small-bert", "seed": 0})
    study.note("baselines", {"original": ORIGINAL})
    genomes = SPACE.sample(max(count, 1), seed=0)
    accuracy = genomes.sum(1) / 10
    study.add_generation(genomes, np.stack([accuracy + 0.01, genomes.sum(1) * 1e6], axis=1), {})
    for at, genome in enumerate(genomes[:count]):
        if at < failures:
            study.add_evaluation(0, genome, None, "ValueError: <b>no</b>", 0.1)
        else:
            metrics = {"accuracy": float(accuracy[at]) ** 0.9, "size": 1e6 * (1 + float(genome.sum()))}
            study.add_evaluation(0, genome, metrics, None, 0.1)
    return study


def layout(rows: int, schemes: tuple[str, ...] = ("none", "W8A8")) -> list[dict]:
    return [
        {"block": f"block{n}", "layer": f"encoder.{n}.up", "name": f"encoder.{n}.up", "kind": "Linear", "rows": rows,
         "columns": 64, "scheme": scheme, "bits": 8.25}
        for n, scheme in enumerate(schemes)
    ]  # fmt: skip


def choose(study: Study, **drawn: object) -> None:
    study.note("choice", {"genome": study.best(knee=True).tolist(), **drawn})


def page(study: Study, folder: Path) -> str:
    return write_report(study, folder / "report.html").read_text()


def own_text(html: str) -> str:
    """The page without plotly's own source."""
    return html[: html.index("<script>")] + html[html.index("<body>") :]


def test_the_page_fetches_nothing(tmp_path):
    html = own_text(page(make_study(), tmp_path))
    assert "https://" not in html
    assert not re.search(r"<(link|img|iframe)|\ssrc=|@import|url\(", html)


def test_a_page_shows_the_front_the_chosen_point_and_its_layers(tmp_path):
    study = make_study()
    choose(study, layers=layout(32), full_layers=layout(64))
    html = page(study, tmp_path)
    text = unescape(html)
    assert "runs/small-bert" in text
    assert "90 MB" in text and "size of the original" in text and "size of the chosen one" in text
    assert "layer by layer" in text and "Predicted against measured" in text and "Hypervolume" in text
    assert "from the reference point accuracy" in text
    assert "<td>the original</td>" in html
    assert "software.torch" in text


def test_a_page_says_whether_the_export_was_verified(tmp_path):
    study = make_study()
    study.note("verified", "verified")
    assert "<b>verified</b><span>export<" in page(study, tmp_path)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_study_that_has_hardly_begun_has_a_page(tmp_path, count):
    html = page(make_study(count=count, failures=0), tmp_path)
    assert ("No evaluation yet" in html) == (count == 0)
    assert "chosen one" not in html


def test_a_study_of_failures_alone_has_a_page(tmp_path):
    html = page(make_study(count=2, failures=2), tmp_path)
    assert "Failed evaluations" in html


def test_a_study_that_is_still_written_to_is_read_from_its_file(tmp_path):
    running = make_study(tmp_path / "study.db")
    html = page(tmp_path / "study.db", tmp_path)
    assert ">20<" in html
    running.close()


def test_names_given_by_the_user_are_text_not_html(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    study = make_study(config={"model": evil, evil: 1})
    choose(study, layers=layout(8, (evil, "none")))
    html = page(study, tmp_path)
    assert evil not in html
    assert "<img" not in own_text(html)
    assert "<b>no</b>" not in html


def test_the_record_names_every_gene_and_marks_those_that_cannot_matter(tmp_path):
    html = page(make_study(), tmp_path)
    record = json.loads(re.search(r'id="record">(.*?)</script>', html, re.S).group(1))
    assert [gene["name"] for gene in record["genes"]] == list(SPACE.names)
    assert len(record["evaluations"]) == 20
    for entry in record["evaluations"].values():
        depth, mlp = entry["genome"][:2]
        assert (mlp == -1) == (depth != 2)
    assert str(record["shown"]) in record["evaluations"]


@pytest.mark.skipif(shutil.which("node") is None, reason="checks the script's syntax where node is there")
def test_the_script_is_javascript(tmp_path):
    (tmp_path / "script.js").write_text(SCRIPT)
    subprocess.run(["node", "--check", tmp_path / "script.js"], check=True)


def test_the_front_figure_has_units_the_original_and_numbers():
    study = make_study()
    figure = front_figure(Shown(study), OBJECTIVES[1], OBJECTIVES[0], study.best(knee=True))
    named = {trace.name: trace for trace in figure.data}
    assert {"the original", "chosen"} < set(named)
    assert list(named["the original"].x) == [90.0]
    assert "size (MB)" in figure.layout.xaxis.title.text
    front = next(trace for name, trace in named.items() if name.startswith("front"))
    assert list(front.customdata) == study.front().sort_values("size")["number"].tolist()
    assert len(front.x) + len(named["evaluated (19)"].x) == 19


def test_an_outlier_makes_an_axis_logarithmic():
    objectives = [Objective("perplexity", "min"), Objective("size", "min")]
    study = Study.create(None, SPACE, objectives, {})
    genomes = SPACE.sample(3, seed=0)
    study.add_generation(genomes, np.full((3, 2), np.nan), {})
    for genome, value in zip(genomes, (17.0, 20.0, 1e6), strict=True):
        study.add_evaluation(0, genome, {"perplexity": value, "size": 1e6}, None, 0.1)
    figure = front_figure(Shown(study), objectives[1], objectives[0], None)
    assert (figure.layout.yaxis.type, figure.layout.xaxis.type) == ("log", None)
    study.note("baselines", {"original": {"perplexity": 0.0, "size": 1e6}})  # where a logarithm has no place
    assert front_figure(Shown(study), objectives[1], objectives[0], None).layout.yaxis.type is None
    assert predictions_figure(Shown(study)) is None


@pytest.mark.parametrize("up", ["min", "max"])
@pytest.mark.parametrize("across", ["min", "max"])
def test_no_corner_of_the_front_s_line_is_better_than_what_was_measured(across, up):
    objectives = [Objective("up", up), Objective("across", across)]
    study = Study.create(None, SPACE, objectives, {})
    genomes = SPACE.sample(5, seed=0)
    study.add_generation(genomes, np.full((5, 2), np.nan), {})
    for genome, cost in zip(genomes, (0.1, 0.5, 0.2, 0.9, 0.7), strict=True):
        values = {"up": objectives[0].sign * (1 - cost) ** 2, "across": objectives[1].sign * cost}
        study.add_evaluation(0, genome, values, None, 0.1)
    front = next(
        t for t in front_figure(Shown(study), objectives[1], objectives[0], None).data if t.name.startswith("front")
    )
    assert len(front.x) == 5
    x, y = np.array(front.x) * objectives[1].sign, np.array(front.y) * objectives[0].sign
    corners = {"hv": (x[1:], y[:-1]), "vh": (x[:-1], y[1:])}[front.line.shape]
    for at in range(len(x) - 1):
        assert corners[0][at] >= x[at : at + 2].max() and corners[1][at] >= y[at : at + 2].max()


def test_a_name_of_one_s_own_is_shown_by_plotly_as_it_is():
    name, shown = """acc "top" '5' <b>&amp; ü</b>""", """acc "top" '5' &lt;b&gt;&amp;amp; ü&lt;/b&gt;"""
    objectives = [Objective(name, "max"), OBJECTIVES[1]]
    study = Study.create(None, SPACE, objectives, {})
    genomes = SPACE.sample(4, seed=0)
    study.add_generation(genomes, genomes.sum(1)[:, None] * [0.1, 1e6], {})
    for genome in genomes:
        study.add_evaluation(0, genome, {name: float(genome.sum()) ** 0.9, "size": 1e6}, None, 0.1)
    up, across = (front_figure(Shown(study), *pair, None).layout for pair in (objectives[::-1], objectives))
    assert up.yaxis.title.text == across.xaxis.title.text == f"{shown} (more is better)"
    predictions = predictions_figure(Shown(study)).layout
    axes = (predictions.xaxis.title.text, predictions.yaxis.title.text)
    assert axes == (f"{shown}, predicted", f"{shown}, measured")
    assert predictions.annotations[0].text.startswith(f"{shown}: rank correlation")


def test_the_layers_figure_shows_the_share_kept_and_leaves_places_empty():
    figure = layers_figure(layout(32, ("W8A8",)), layout(64))
    named = {trace.name: trace for trace in figure.data if trace.showlegend is not False}
    assert list(named["W8A8"].x) == ["encoder.0.up"]
    assert list(named["W8A8"].y) == [50.0]
    assert list(named["the whole model"].x) == ["encoder.0.up", "encoder.1.up"]
    assert [list(trace.y) for trace in figure.data if trace.showlegend is False] == [[8.25]]  # bits a weight


def test_predictions_are_compared_by_rank():
    figure = predictions_figure(Shown(make_study()))
    assert "rank correlation 1.00 (Spearman, 19 evaluations)" in figure.layout.annotations[0].text
    assert "accuracy" in figure.layout.annotations[0].text
    assert len(figure.layout.annotations) == 1, "an exact cost is not predicted"


def test_hypervolume_never_falls():
    figure = hypervolume_figure(make_study())
    assert (np.diff(figure.data[0].y) >= 0).all()


def test_hypervolume_is_in_the_units_that_the_axes_have():
    study = Study.create(None, SPACE, OBJECTIVES, {})
    for genome, accuracy, size in zip(SPACE.sample(2, seed=0), (0.5, 1.0), (1e6, 2e6), strict=True):
        study.add_evaluation(0, genome, {"accuracy": accuracy, "size": size}, None, 0.1)
    first = (0.5 - 0.45) * (2.1 - 1)  # from a tenth of each span beyond the worst: an accuracy of 0.45, 2.1 MB
    np.testing.assert_allclose(hypervolume_figure(study).data[0].y, [first, first + (1 - 0.5) * (2.1 - 2)])


def test_each_cost_is_drawn_against_the_quality():
    named = [Objective(n, d) for n, d in (("loss", "min"), ("macs", "min"), ("size", "min"))]
    assert [(x.name, y.name) for x, y in axes(named, named[:1])] == [("size", "loss"), ("macs", "loss")]
    own = [Objective("a", "min"), Objective("b", "max")]
    assert [(x.name, y.name) for x, y in axes(own, own)] == [("b", "a")]
    assert axes(own[:1], own[:1]) == []
    mine = [Objective("mine", "min"), *own]
    assert [(x.name, y.name) for x, y in axes(mine, own)] == [("mine", "a"), ("mine", "b")]


def test_each_objective_is_on_a_plot():
    named = {n: Objective(n, "min") for n in ("accuracy", "loss", "kl", "size", "macs")}
    quality, costs = list(named.values())[:3], list(named.values())[3:]
    for objectives, measured in (((*quality, *costs), quality), (quality, quality), (costs, [])):
        drawn = axes(list(objectives), measured)
        assert {each.name for pair in drawn for each in pair} == {each.name for each in objectives}
        assert len(drawn) == len(objectives) - 1


def test_one_objective_alone_has_a_page_too(tmp_path):
    study = Study.create(None, SPACE, OBJECTIVES[:1], {})
    study.add_generation(SPACE.sample(1, seed=0), np.full((1, 1), np.nan), {})
    study.add_evaluation(0, SPACE.sample(1, seed=0)[0], {"accuracy": 0.5}, None, 0.1)
    html = page(study, tmp_path)
    assert "in numbers" in html and 'id="genome"' in html
    assert "Hover over one" not in html


def test_a_cost_of_ones_own_is_neither_finished_nor_scored_on_unseen_data(tmp_path):
    mine = Objective("mine", "min", compute=lambda genomes: genomes.sum(1) + 0.0)
    study = Study.create(None, SPACE, [mine, *OBJECTIVES], {})
    genome = SPACE.sample(1, seed=0)
    study.add_generation(genome, np.full((1, 3), np.nan), {})
    study.add_evaluation(0, genome[0], {"mine": 3.0, "accuracy": 0.5, "size": 1e6}, None, 0.1)
    study.add_finished(genome[0], "gptq", {"accuracy": 0.625, "size": 1e6}, 1.0)
    study.note("unseen", [{"genome": genome[0].tolist(), "metrics": {"accuracy": 0.25}, "errors": {}}])
    shown = printed(front_table(study)) + printed(finished_table(study))
    for text in (shown, own_text(page(study, tmp_path))):
        assert "accuracy, unseen data" in text and "mine, unseen data" not in text and "0.625" in text


def test_the_finishing_that_was_exported_is_the_marked_one_and_the_chosen_point(tmp_path):
    study = make_study()
    genome = study.best(knee=True)
    for rounding, accuracy in (("gptq", 0.3125), ("descent", 0.4375)):
        study.add_finished(genome, rounding, {"accuracy": accuracy, "size": 1e6}, 1.0)
    study.note("choice", {"genome": genome.tolist(), "rounding": "descent"})
    marked = [line for line in printed(finished_table(study, genome, "descent")).splitlines() if "*" in line]
    assert len(marked) == 1 and "descent" in marked[0]
    assert "*" not in printed(finished_table(study, genome, "nearest"))
    marked = re.findall('<tr class="chosen">(.*?)</tr>', page(study, tmp_path))
    assert "<td>descent</td><td>1</td>" in marked[-1]  # its size stands after it
    figure = front_figure(Shown(study), OBJECTIVES[1], OBJECTIVES[0], genome)
    (chosen,) = (trace for trace in figure.data if trace.name == "chosen")
    assert list(chosen.y) == [0.4375]


def test_a_page_reads_the_evaluations_once(tmp_path):
    read, study = [], make_study()
    study.add_finished(study.best(knee=True), "gptq", {"accuracy": 0.3125, "size": 1e6}, 1.0)
    choose(study, layers=layout(32))
    study._connection.set_trace_callback(read.append)
    page(study, tmp_path)
    assert sum("genome, metrics" in each for each in read) == 1
    assert sum("genomes" in each for each in read) == 1


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(JointoptError, match="report.html' cannot be written"):
        write_report(make_study(), tmp_path / "none" / "report.html")
    for path in (None, ""):
        with pytest.raises(JointoptError, match=f"found path {path!r}; allowed: that of an HTML file"):
            write_report(make_study(), path)


def test_a_page_that_a_link_names_is_replaced_and_a_pipe_is_not(tmp_path):
    (tmp_path / "site").mkdir()
    page, link, pipe = tmp_path / "site/index.html", tmp_path / "latest.html", tmp_path / "pipe"
    page.write_text("old")
    link.symlink_to(page)
    os.mkfifo(pipe)
    write_report(make_study(), link)
    assert link.is_symlink() and page.read_text() != "old"
    with pytest.raises(JointoptError, match="pipe' cannot be written: it is a device or a pipe"):
        write_report(make_study(), pipe)
    assert pipe.is_fifo() and sorted(each.name for each in tmp_path.iterdir()) == ["latest.html", "pipe", "site"]


def test_a_device_by_its_name_alone_is_refused(tmp_path):
    with pytest.raises(JointoptError, match="report: found device 'h100'; allowed: what .*on_device gives"):
        write_report(make_study(), tmp_path / "report.html", devices=["h100"])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("count", [0, 1, 20])
def test_each_evaluation_of_a_study_succeeded_or_failed(count):
    study = make_study(count=count)
    assert study.failed()["number"].tolist() == list(range(1, count + 1))[:1]
    assert study.succeeded()["number"].tolist() == list(range(1, count + 1))[1:]


def test_a_rounding_that_nothing_was_finished_by_is_refused():
    study = make_study()
    with pytest.raises(JointoptError, match="found finished='gptq'; allowed: none, since nothing was finished"):
        study.best(finished="gptq")
    study.add_finished(study.best(), "gptq", {"accuracy": 0.9, "size": 1e6}, 1.0)
    with pytest.raises(JointoptError, match="found finished='zzz'; allowed: gptq"):
        study.best(finished="zzz")
    assert study.best(finished="gptq").shape == (len(SPACE),)


def test_values_are_written_with_the_unit_that_they_are_scaled_to():
    assert written("size", 20_312_345.0) == "20.31 MB"
    assert written("latency", 0.0003374) == "0.3374 ms"
    assert written("accuracy", 0.91234) == "0.9123"
    assert written("loss", float("nan")) == "-"


def test_counts_beyond_any_float_are_written():
    assert (counted(1234567), counted(19 * 10**15), counted(10**400)) == ("1,234,567", "1.9e+16", "1.0e+400")


def printed(table: object, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_a_narrow_terminal_shows_all_digits():
    costs = {"original": {"parameters": 66362880.0, "macs": 123456789.0, "size": 123456000.0}}
    narrow = printed(extremes_table(costs), 30).splitlines()
    cells = [[each.strip() for each in line.split("│")[2:-1]] for line in narrow if line.startswith("│")]
    wide = next(line for line in printed(extremes_table(costs)).splitlines() if "original" in line)
    assert ["".join(column) for column in zip(*cells, strict=True)] == wide.replace("│", " ").split()[1:]
    assert len(cells) > 1


def test_the_terminal_shows_the_front_and_the_original():
    study = make_study()
    text = printed(front_table(study, study.best(knee=True)))
    assert "size (MB)" in text and "the original" in text and "* chosen" in text
    assert f"front: {len(study.front())} of 20 evaluations" in text


def test_the_terminal_and_the_page_list_the_same_numbers_from_small_to_large(tmp_path):
    study = make_study()
    study.note("baselines", {"original": {"accuracy": 0.123456789}})
    study.note("unseen", [{"genome": None, "metrics": {"accuracy": 0.3456789}, "errors": {"accuracy": 0.01}}])
    table = page(study, tmp_path).partition("Front, in numbers")[2].partition("</table>")[0]
    rows = [re.findall("<td>(.*?)</td>", row) for row in table.split("</tr>")[1:-1]]
    sizes = [float(row[2]) for row in rows[:-1]]
    assert len(sizes) > 1 and sizes == sorted(sizes)
    assert rows[-1] == ["the original", "0.123457", "-", "0.345679 ± 0.01"]
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed(front_table(study)).splitlines()]
    assert [line for line in lines if line] == rows


def test_the_terminal_tells_how_many_evaluations_failed_and_why_most_of_them():
    study = make_study(count=18, failures=2)
    study.add_evaluation(0, SPACE.largest, None, "KeyError: [label]", 0.1)
    text = " ".join(printed(front_table(study)).split())
    assert "failed evaluations: 3, 2 of them with ValueError: <b>no</b>" in text
    assert "failed" not in printed(front_table(make_study(failures=0)))


def test_a_point_that_is_not_on_the_front_is_not_said_to_be_marked_there():
    study = Study.create(None, SPACE, OBJECTIVES, {})
    assert "chosen" not in printed(front_table(study, SPACE.largest))


def test_a_long_front_is_thinned_out_but_keeps_the_chosen_point():
    space = SearchSpace([Gene("x", tuple(range(100)))])
    study = Study.create(None, space, OBJECTIVES, {})
    genomes = np.arange(100).reshape(-1, 1)
    study.add_generation(genomes, np.full((100, 2), np.nan), {})
    for genome in genomes:
        study.add_evaluation(0, genome, {"accuracy": float(genome[0]), "size": float(genome[0])}, None, 0.1)
    text = printed(front_table(study, [17]))
    assert "18 *" in text and text.count("\n") < ROWS + 12


def test_the_terminal_shows_genes_and_extremes():
    text = printed(space_table(SPACE))
    assert "block3.mlp" in text and "64, 128" in text and "depth 4" in text
    assert "22.5" in printed(extremes_table({"largest": ORIGINAL}))
