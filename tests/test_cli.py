"""The command as people use it: from a config to a verified export, with what it shows on the way."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from jointopt import Gene, Objective, SearchSpace, Study
from jointopt.cli import main
from jointopt.config.config import load_config
from jointopt.prepared import prepare
from jointopt.run_folder import STUDY
from jointopt.workflow import make_supernet
from tests.commands import ROOT, at_once, command, refused, write_config
from tests.saved import save_bert, save_timm, write_images, write_reviews


@pytest.mark.parametrize("use", ["SearchSpace", "strategies", "Study", "cli._parser().format_help()"])
def test_what_needs_no_model_loads_no_torch(use):
    code = f"import sys, jointopt.cli; jointopt.{use}; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100).returncode


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """The output of a run, its last line checked."""
    write_config(place)
    done = command("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("verified: runs/vit/export: accuracy ")
    return place / "runs/vit"


def test_a_run_leaves_a_study_a_report_and_an_export(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "study.db", "report.html", "export"} <= names
    study = Study.open(finished / "study.db")
    assert len(study) == 12
    assert study.fact("verified") == "verified"
    assert not [name for name in names if name.startswith(".") and name.endswith("export")]


def test_nothing_of_the_libraries_inside_reaches_the_terminal(finished):
    done = command("report", "runs/vit", cwd=finished.parents[1])
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_front_is_shown_where_its_page_cannot_be_written(finished):
    done = at_once("report", "runs/vit", "-o", "nowhere/report.html", cwd=finished.parents[1])
    assert done.returncode == 2 and "nowhere/report.html' cannot be written: No such file" in done.stderr
    assert "the original" in done.stdout and "report: " not in done.stdout


def test_a_character_that_the_output_has_no_code_for_is_a_question_mark(finished, tmp_path, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["report", str(finished), "-o", str(tmp_path / "±.html")]) == 0
    narrow.flush()
    assert narrow.buffer.getvalue().decode().splitlines()[-1] == f"report: {tmp_path}/?.html"


@pytest.mark.parametrize("words", [("report", "runs/vit"), ("init", "vit", "-o", "-")], ids=" ".join)
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_output_that_nobody_reads_any_more_ends_a_command_without_a_word(words, buffered, finished):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "jointopt", *words],
            cwd=finished.parents[1],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": buffered},
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("kind", ["bert", "timm"])
def test_other_libraries_and_tasks_run_through(kind, tmp_path):
    if kind == "bert":
        save_bert(tmp_path / "bert")
        write_reviews(tmp_path / "reviews.csv")
        data = {"calibrate": "reviews.csv", "evaluate": "reviews.csv"}
        changes = {"model": "bert", "task": "text-classification", "data": data}
    else:
        save_timm(tmp_path / "timm")
        write_images(tmp_path / "images")
        changes = {"model": "timm"}
    write_config(tmp_path, **changes, search={"evaluations": 6}, output="out", space={"schemes": ["W8A8", "NVFP4"]})
    done = at_once("run", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("verified: ")


def test_a_function_of_ones_own_scores_the_model(place):
    (place / "mine.py").write_text(
        "import torch\n\n"
        "def spread(model):\n"
        "    return float(model(pixel_values=torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)).logits.std())\n\n"
        "def sometimes(model):\n"
        "    if model.config.num_hidden_layers == 1:\n"
        "        raise RuntimeError('no thanks')\n"
        "    return spread(model)\n"
    )
    own = {"task": None, "objectives": ["quality", "size"], "data": {"calibrate": "images"}}
    write_config(place, output="runs/own", quality="mine.spread", **own)
    done = command("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    write_config(place, output="runs/sometimes", quality="mine.sometimes", **own)
    done = command("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    failed = Study.open(place / "runs/sometimes/study.db").evaluations()["failed"].dropna()
    assert len(failed)
    assert all("no thanks" in reason for reason in failed)


@pytest.mark.parametrize("known", ["nothing", "an empty study", "its score"])
def test_the_original_is_scored_by_a_function_of_ones_own_before_training_unless_a_study_has_its_score(
    place, tmp_path, known
):
    own = {"task": None, "objectives": ["quality"], "quality": "math.sqrt"}
    data = {name: str(place / "images") for name in ("calibrate", "train")}
    changes = {"model": str(place / "vit"), "output": str(tmp_path), "data": data, "train": {"steps": 1}}
    config = load_config(write_config(place, **own, **changes))
    scored: list[torch.nn.Module] = []
    prepared = replace(prepare(config), quality=lambda model: scored.append(model) or 1.0)
    if known == "an empty study":
        (tmp_path / STUDY).touch()
    if known == "its score":
        space = SearchSpace([Gene("depth", (1, 2))])
        with contextlib.closing(Study.create(tmp_path / STUDY, space, [Objective("quality", "max")], {})) as study:
            study.note("baselines", {"original": {"quality": 1.0}})
    make_supernet(config, prepared, Console(quiet=True))
    assert len(scored) == (known != "its score")


def test_a_path_behind_an_equals_sign_may_begin_at_home(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = at_once("report", "runs/vit", "--out=~/seen.html", cwd=finished.parents[1])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen.html").is_file()


def test_init_writes_a_config_that_can_be_run(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["init", "vit", "-o", "started.yaml"]) == 0
    assert load_config("started.yaml").model == "vit"
    assert "exists; choose another file" in refused(capsys, place, monkeypatch, "init", "vit", "-o", "started.yaml")


def test_space_shows_genes_and_both_ends(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    write_config(place)
    assert main(["space", "config.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "block0.mlp" in shown
    assert "genomes" in shown.splitlines()[-1]


@pytest.mark.slow
def test_nothing_of_the_libraries_inside_its_workers_does_either(place):
    write_config(place, output="runs/two", search={"evaluations": 2, "workers": 2})
    done = command("run", "config.yaml", cwd=place)
    assert done.returncode == 0
    assert done.stderr == ""
