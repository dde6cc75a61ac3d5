"""The command as people use it: from a config to a verified export, and one line for whatever does not fit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from jointopt import Gene, Objective, SearchSpace, Study
from jointopt.cli import main
from jointopt.config.config import load_config
from jointopt.files import locked
from jointopt.prepared import prepare
from jointopt.run_folder import CHECKPOINT, LOCK, STUDY, taken
from jointopt.workflow import make_supernet
from tests.commands import ROOT, at_once, command, heed_ctrl_c
from tests.saved import save_bert, save_llama, save_timm, save_vit, write_images, write_reviews


@pytest.mark.parametrize("use", ["SearchSpace", "strategies", "Study", "cli._parser().format_help()"])
def test_what_needs_no_model_loads_no_torch(use):
    code = f"import sys, jointopt.cli; jointopt.{use}; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100).returncode


def write_config(folder: Path, **changes: object) -> Path:
    content: dict = {
        "model": "vit",
        "task": "image-classification",
        "data": {"calibrate": "images", "evaluate": "images", "batch_size": 12},
        "space": {"depth": [1, 2], "mlp": [64, 128], "schemes": ["none", "W8A8", "W4A16"]},
        "objectives": ["accuracy", "size"],
        "search": {"evaluations": 12},
        "device": "cpu",
        "output": "runs/vit",
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and its data, as a user has them."""
    folder = tmp_path_factory.mktemp("place")
    save_vit(folder / "vit")
    write_images(folder / "images")
    return folder


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


def test_a_character_that_the_output_has_no_code_for_is_a_question_mark(finished, tmp_path, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["report", str(finished), "-o", str(tmp_path / "±.html")]) == 0
    narrow.flush()
    assert narrow.buffer.getvalue().decode().splitlines()[-1] == f"report: {tmp_path}/?.html"


def test_a_second_run_does_nothing_again_and_more_evaluations_go_on(finished):
    place = finished.parents[1]
    export, study = finished / "export/model.safetensors", Study.open(finished / "study.db")
    before = export.stat().st_mtime_ns, study.evaluations()
    again = at_once("run", "config.yaml", cwd=place)
    assert again.returncode == 0, again.stderr
    assert export.stat().st_mtime_ns == before[0]
    assert study.evaluations().equals(before[1])
    more = at_once("run", "config.yaml", "--evaluations", 14, "--overwrite", cwd=place)
    assert more.returncode == 0, more.stderr
    assert len(study) == 14
    assert study.evaluations()[:12].equals(before[1])


def test_another_point_of_the_front_is_exported_and_verified(finished, tmp_path):
    place = finished.parents[1]
    number = int(Study.open(finished / "study.db").front()["number"].iloc[-1])
    done = command("export", "runs/vit", "--pick", number, "--to", tmp_path / "picked", cwd=place)
    assert done.returncode == 0, done.stderr
    verified = command("verify", tmp_path / "picked", "--config", "runs/vit/config.yaml", cwd=place)
    assert verified.returncode == 0, verified.stdout
    assert verified.stdout.startswith(f"verified: {tmp_path / 'picked'}: accuracy ")


def test_verify_exits_with_1_and_names_the_difference_where_a_weight_was_changed(finished, tmp_path):
    place = finished.parents[1]
    assert at_once("export", "runs/vit", "--pick", "knee", "--to", tmp_path / "bent", cwd=place).returncode == 0
    tensors = load_file(tmp_path / "bent/model.safetensors")
    tensors["classifier.bias"] += 5 * torch.arange(3)
    save_file(tensors, tmp_path / "bent/model.safetensors", metadata={"format": "pt"})
    done = at_once("verify", tmp_path / "bent", "--config", "runs/vit/config.yaml", cwd=place)
    assert done.returncode == 1
    assert done.stdout.startswith("not verified: ")
    assert "outputs: " in done.stdout
    assert "Traceback" not in done.stderr


def test_verify_refuses_the_config_of_another_task(finished, tmp_path):
    save_bert(tmp_path / "bert")
    write_reviews(tmp_path / "reviews.csv")
    data = {"calibrate": "reviews.csv", "evaluate": "reviews.csv"}
    write_config(tmp_path, model="bert", task="text-classification", data=data, space={"schemes": ["W8A8"]})
    done = at_once("verify", finished / "export", "--config", "config.yaml", cwd=tmp_path)
    told = "export' is of image-classification, 'config.yaml' of text-classification; allowed: one task\n"
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(told)


def swap_channels_mean(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"image_mean": [', '"image_mean": [0.25],\n  "was": ['))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "processor: "),
        (swap_channels_mean, "processor: pixel_values that the export's ViTImageProcessor makes of the calibration "),
    ],
)
def test_verify_exits_with_1_where_the_image_processor_is_gone_or_another(finished, damage, said, tmp_path):
    folder = shutil.copytree(finished / "export", tmp_path / "export")
    damage(folder)
    done = at_once("verify", folder, "--config", "runs/vit/config.yaml", cwd=finished.parents[1])
    assert (done.returncode, done.stderr) == (1, "")
    assert f"not verified: {folder}: {said}" in done.stdout


def test_verify_tells_all_differences_of_weights_that_are_no_numbers_and_of_files_cut_short(finished, tmp_path):
    place = finished.parents[1]
    assert at_once("export", "runs/vit", "--pick", "knee", "--to", tmp_path / "nan", cwd=place).returncode == 0
    weights = tmp_path / "nan/model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"] *= float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    done = at_once("verify", tmp_path / "nan", "--config", "runs/vit/config.yaml", cwd=place)
    assert done.returncode == 1 and "outputs: nan apart" in done.stdout and "quality returned nan" in done.stdout
    weights.write_bytes(weights.read_bytes()[:50])
    done = at_once("verify", tmp_path / "nan", cwd=place)
    assert done.returncode == 2 and "is cut short" in done.stderr and "Traceback" not in done.stderr
    record = json.loads((tmp_path / "nan/jointopt.json").read_text())
    (tmp_path / "nan/jointopt.json").write_text(json.dumps({**record, "probe": 3}))
    done = at_once("verify", tmp_path / "nan", cwd=place)
    assert done.returncode == 2 and "probe: found 3; allowed: what export wrote" in done.stderr
    (tmp_path / "nan/jointopt.json").write_text("[]")
    done = at_once("verify", tmp_path / "nan", cwd=place)
    assert (
        done.returncode == 2
        and "has no choices, probe, costs, layers" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(place):
    write_config(place, output="runs/stopped", search={"evaluations": 400, "strategy": "random"}, choose="knee")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "jointopt", "run", "config.yaml"]
    process = subprocess.Popen(
        words, cwd=place, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, preexec_fn=heed_ctrl_c
    )
    database = place / "runs/stopped/study.db"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (database.is_file() and _count(database) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().strip().endswith("interrupted; the same command goes on from here")
    done = _count(database)
    assert 2 < done < 400
    # Past the batch that was interrupted, whose genomes are not evaluated in the order of asking.
    resumed = at_once("run", "config.yaml", "--evaluations", done + 20, cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    assert _count(database) == done + 20


def _count(database: Path) -> int:
    try:
        return len(Study.open(database))
    except ValueError:
        return 0


def test_a_trained_super_network_is_not_trained_again(place):
    data = {"train": "images", "evaluate": "images", "batch_size": 12}
    train = {"steps": 3, "batch_size": 4}
    write_config(place, output="runs/trained", data=data, train=train, search={"evaluations": 3})
    first = at_once("run", "config.yaml", cwd=place)
    assert first.returncode == 0, first.stderr
    weights = place / "runs/trained/supernet.safetensors"
    before = weights.stat().st_mtime_ns
    assert at_once("run", "config.yaml", "--evaluations", 5, "--overwrite", cwd=place).returncode == 0
    assert weights.stat().st_mtime_ns == before


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


def refused(capsys, place: Path, monkeypatch, *words: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    monkeypatch.chdir(place)
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("jointopt: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objektives": ["accuracy"]}, "did you mean 'objectives'"),
        ({"search": {"evaluations": "many"}}, "search.evaluations"),
        ({"model": "gone"}, "model: "),
        ({"data": {"calibrate": "images", "evaluate": "gone.csv"}}, "data.evaluate: no file or folder 'gone.csv'"),
        ({"space": {"heads": [3], "schemes": ["none"]}}, "space.heads (block0.heads): found 3; allowed: 1 to 2"),
        ({"space": {"mlp": [129]}}, "space.mlp (block0.mlp): found 129; allowed: 1 to 128"),
        ({"space": {"schemes": ["W3A3"]}}, "scheme 'W3A3': unknown"),
        ({"space": {"preset": "fixed", "schemes": ["none"]}}, "space: nothing is elastic"),
        ({"space": {"depth": [1], "schemes": ["none"]}}, "space: holds one genome"),
        ({"objectives": ["perplexity", "size"]}, "objectives: found perplexity; allowed: "),
        ({"quality": "mine.nothing", "task": None}, "quality: "),
        ({"device": "cuda:9"}, "device: cuda:9 is not available here"),
        ({"output": "images"}, "output: 'images' exists and is no run"),
        ({"output": "a\0b"}, r"output: 'a\x00b' cannot be looked up: "),
        ({"choose": {"size_mb": 1, "drop": 1}}, "allowed: one of size_mb, drop, knee"),
        ({"target": "vllm"}, "target vllm: found a vit; allowed: language models of llama"),
        ({"target": "gguf", "space": None}, "target gguf: found a vit; allowed: language models of llama"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(changes, said, place, capsys, monkeypatch):
    write_config(place, **{"output": "runs/bad", **changes})
    assert said in refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert not (place / "runs/bad/study.db").exists()


def test_a_model_of_an_unknown_family_is_named(place, capsys, monkeypatch):
    from transformers import ViTImageProcessor, ViTMAEConfig

    (place / "other").mkdir()
    ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(place / "other")
    ViTImageProcessor().save_pretrained(place / "other")
    write_config(place, model="other", output="runs/bad")
    assert "model: 'other'" in refused(capsys, place, monkeypatch, "run", "config.yaml")


def test_labels_that_the_model_lacks_are_named(place, capsys, monkeypatch):
    write_images(place / "birds", classes=("crow", "jay", "owl", "tit"))
    write_config(place, data={"calibrate": "images", "evaluate": "birds"}, output="runs/bad")
    assert "data.evaluate.label: found 4 folders, and the model has 3 classes" in refused(
        capsys, place, monkeypatch, "run", "config.yaml"
    )


def test_a_cluster_without_ray_is_told_before_anything_is_read(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_config(place, model="gone", search={"ray": "auto"}, output="runs/bad")
    said = refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert "search.ray: found 'auto', and no ray; pip install 'jointopt[ray]'" in said


def test_a_function_that_always_fails_stops_the_run_after_the_first_batch(place, capsys, monkeypatch):
    (place / "broken.py").write_text(
        "calls = []\n\ndef quality(model):\n    calls.append(1)\n    return 1.0 if len(calls) == 1 else float('nan')\n"
    )
    own = {"task": None, "objectives": ["quality", "size"], "data": {"calibrate": "images"}}
    write_config(place, output="runs/nan", quality="broken.quality", **own)
    monkeypatch.syspath_prepend(str(place))
    assert "all 5 evaluations failed" in refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert len(Study.open(place / "runs/nan/study.db")) == 5


def test_where_nothing_keeps_to_a_constraint_what_was_searched_can_still_be_exported(place, capsys, monkeypatch):
    write_config(place, output="runs/hard", constraints={"accuracy": ">= 1"}, search={"evaluations": 5})
    monkeypatch.chdir(place)
    assert main(["run", "config.yaml"]) == 2
    shown = capsys.readouterr()
    said = shown.err.strip().splitlines()[-1]
    assert "constraints: no evaluation has accuracy >= 1; the closest has 0." in said
    assert said.endswith("; export --pick NUMBER takes any evaluation")
    assert "front: " in shown.out and "* chosen" not in shown.out
    assert (place / "runs/hard/report.html").is_file()
    assert main(["export", "runs/hard", "--pick", "3"]) == 0


def test_a_study_that_has_asked_for_nothing_holds_the_output_to_no_config(place):
    write_config(place, output="runs/idle", constraints={"accuracy": ">= 1"})
    config = load_config(place / "config.yaml", {"output": str(place / "runs/idle")})
    with taken(config):
        space = SearchSpace([Gene("a", (1, 2))])
        Study.create(place / "runs/idle" / STUDY, space, [Objective("size", "min")], {}).close()
    write_config(place, output="runs/idle", search={"evaluations": 2})
    done = at_once("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert len(Study.open(place / "runs/idle" / STUDY)) == 2


def test_another_config_in_the_same_output_is_refused_and_harms_nothing(finished, capsys, monkeypatch):
    place = finished.parents[1]
    study, export = (finished / "study.db").read_bytes(), (finished / "export/model.safetensors").read_bytes()
    write_config(place, space={"depth": [1, 2], "schemes": ["none", "W8A8"]})
    assert "was made with another config: space." in refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert (finished / "study.db").read_bytes() == study
    assert (finished / "export/model.safetensors").read_bytes() == export


def test_a_second_run_in_an_output_folder_is_refused_and_harms_nothing(finished, capsys, monkeypatch):
    place = finished.parents[1]
    write_config(place)
    before = (finished / "config.yaml").read_bytes()
    with contextlib.closing(locked(finished / LOCK, "it")):
        said = refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert "output 'runs/vit': another process is writing to it" in said
    assert (finished / "config.yaml").read_bytes() == before


def test_a_super_network_trained_on_other_images_is_not_gone_on_with(place, capsys, monkeypatch):
    write_images(place / "taught")
    data = {"train": "taught", "calibrate": "images", "evaluate": "images", "batch_size": 12}
    train, search = {"steps": 2, "batch_size": 4}, {"evaluations": 2}
    write_config(place, output="runs/taught", data=data, train=train, search=search)
    assert at_once("run", "config.yaml", cwd=place).returncode == 0
    before = (place / "runs/taught/supernet.safetensors").read_bytes()
    for path in (place / "taught").rglob("*.png"):
        Image.new("RGB", (16, 16), "red").save(path)
    said = refused(capsys, place, monkeypatch, "run", "config.yaml", "--evaluations", "3")
    assert "data.train: has other contents than the super-network in 'runs/taught' was trained with" in said
    assert (place / "runs/taught/supernet.safetensors").read_bytes() == before
    for damaged in ('{"space"', "[1]"):  # which is no reason to train over what is there
        (place / "runs/taught/supernet.json").write_text(damaged)
        said = refused(capsys, place, monkeypatch, "run", "config.yaml", "--evaluations", "3")
        assert "output: 'runs/taught/supernet.json' cannot be read: " in said
        assert (place / "runs/taught/supernet.safetensors").read_bytes() == before


def test_other_images_under_the_same_name_are_noticed(place, capsys, monkeypatch):
    write_images(place / "mine")
    write_config(place, data={"calibrate": "images", "evaluate": "mine"}, output="runs/mine", search={"evaluations": 2})
    assert at_once("run", "config.yaml", cwd=place).returncode == 0
    for path in (place / "mine").rglob("*.png"):
        Image.new("RGB", (16, 16), "red").save(path)
    assert "contents.evaluate was" in refused(capsys, place, monkeypatch, "run", "config.yaml")


def test_a_training_that_was_killed_goes_on_with_its_own_config_alone(place, capsys, monkeypatch):
    data = {"train": "images", "evaluate": "images", "batch_size": 12}
    write_config(place, output="runs/killed", data=data, train={"steps": 3, "batch_size": 4})
    output = place / "runs/killed"
    output.mkdir(parents=True)
    (output / "config.yaml").write_text(load_config(place / "config.yaml").to_yaml())
    (output / CHECKPOINT).touch()
    write_config(place, output="runs/killed", data=data, train={"steps": 4, "batch_size": 4})
    assert "train.steps was 3, is 4" in refused(capsys, place, monkeypatch, "run", "config.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "runs/vit", "--pick", "best"), "--pick: found 'best'; allowed: "),
        (("export", "runs/vit", "--pick", "drop=inf"), "--pick: found 'drop=inf'; allowed: "),
        (("export", "runs/vit", "--pick", "999"), "--pick: found evaluation 999; the study has 1 to "),
        (("export", "runs/vit", "--pick", "size_mb=0.0001"), "size_mb: found 0.0001; the smallest evaluated has "),
        (("export", "runs/vit", "--pick", "knee"), "exists; choose another with --to"),
        (("verify", "nowhere"), "verify: no folder 'nowhere'"),
        (("verify", "vit"), "'vit' is no export"),
        (
            ("report", "runs/vit", "--device", "a100", "--context", "0"),
            "--context: found 0; allowed: a whole number from 1",
        ),
        (("report", "runs/vit", "--batch", "8"), "--batch: found 8 and no --device; allowed: with one"),
        (("report", "runs/vit", "-o", "."), "report: found path '.'; allowed: that of an HTML file"),
        (("report", "nowhere"), "study: 'nowhere' does not exist"),
        (("run", "nowhere.yaml"), "nowhere.yaml: No such file"),
        (("init", "nowhere/at/all"), "model: no folder 'nowhere/at/all'"),
        (("space", "nowhere.yaml"), "nowhere.yaml: No such file"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(words, said, finished, capsys, monkeypatch):
    assert said in refused(capsys, finished.parents[1], monkeypatch, *words)


def test_a_study_that_has_just_begun_is_not_shown_on_a_device(finished, capsys, monkeypatch):
    place, begun = finished.parents[1], finished.with_name("begun")
    begun.mkdir()
    shutil.copy(finished / "config.yaml", begun)
    Study.create(begun / "study.db", SearchSpace([Gene("a", (1, 2))]), [Objective("size", "min")], {}).close()
    said = refused(capsys, place, monkeypatch, "report", "runs/begun", "--device", "a100")
    assert "--device: the study has no evaluation yet; allowed: with one or more" in said


def test_an_empty_path_is_not_taken_for_the_default(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "runs/vit", "--pick", "knee", "--to", "", "--overwrite"])
    assert "argument --to: found ''; allowed: a path" in capsys.readouterr().err


def test_a_path_behind_an_equals_sign_may_begin_at_home(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = at_once("report", "runs/vit", "--out=~/seen.html", cwd=finished.parents[1])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen.html").is_file()


def test_an_export_that_is_refused_leaves_the_choice_as_it_was(finished, capsys, monkeypatch):
    study = Study.open(finished / "study.db")
    before = study.fact("choice"), study.fact("verified")
    words = ("export", "runs/vit", "--pick", "1", "--target", "gguf", "--overwrite")
    assert "target gguf: found a vit" in refused(capsys, finished.parents[1], monkeypatch, *words)
    assert (study.fact("choice"), study.fact("verified")) == before


def test_an_export_that_its_target_cannot_hold_is_refused_before_it_is_finished(tmp_path, capsys, monkeypatch):
    save_llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("the film was very good " * 40)
    given = {"model": "llama", "task": "causal-lm", "data": {"calibrate": "text.txt", "evaluate": "text.txt"}}
    rest = {"objectives": None, "search": {"evaluations": 2}, "output": "runs/llama"}
    write_config(tmp_path, space={"preset": "fixed", "schemes": ["none", "FP8"]}, **given, **rest)
    done = at_once("run", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "runs/llama/config.yaml", "a") as file:
        file.write("finish: {rounding: gptq}\n")
    words = ("export", "runs/llama", "--pick", "2", "--to", "other", "--target", "vllm")
    assert "target vllm: FP8 has no form there" in refused(capsys, tmp_path, monkeypatch, *words)
    study = Study.open(tmp_path / "runs/llama/study.db")
    assert not study.finished() and not (tmp_path / "other").exists()


@pytest.fixture
def copied(finished, capsys, monkeypatch) -> Path:
    """The output of a run whose export is another evaluation than the run itself chooses."""
    place = finished.parents[1]
    monkeypatch.chdir(place)
    shutil.rmtree("runs/copied", ignore_errors=True)
    shutil.copytree(finished, "runs/copied")
    write_config(place, output="runs/copied")
    rows = Study.open("runs/copied/study.db")
    genome = rows.fact("choice")["genome"]
    other = next(int(row.number) for row in rows.evaluations().itertuples() if list(row.genome) != genome)
    assert main(["export", "runs/copied", "--pick", str(other), "--overwrite"]) == 0
    capsys.readouterr()
    return place / "runs/copied"


def test_a_run_whose_export_is_refused_leaves_the_choice_as_it_was(copied, capsys, monkeypatch):
    before = Study.open(copied / "study.db").fact("choice")
    said = refused(capsys, copied.parents[1], monkeypatch, "run", "config.yaml")
    assert "'runs/copied/export' exists and holds another model; --overwrite replaces it" in said
    assert Study.open(copied / "study.db").fact("choice") == before


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ((), {"target": "onnxruntime"}, "exists and holds another model; --overwrite replaces it"),
        ((), {"rounding": "gptq"}, "exists and holds another model; --overwrite replaces it"),
        ((), "{", "export: 'runs/copied/export/jointopt.json' cannot be read: "),
        (("--overwrite",), None, "holds no jointopt.json"),
    ],
)
def test_an_export_that_no_choice_can_replace_is_refused_before_the_search(
    words, changes, said, copied, capsys, monkeypatch
):
    record = copied / "export/jointopt.json"
    if changes is None:
        record.unlink()
    elif isinstance(changes, str):
        record.write_text(changes)
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    (copied / "study.db").unlink()
    assert said in refused(capsys, copied.parents[1], monkeypatch, "run", "config.yaml", *words)
    assert not (copied / "study.db").exists()


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
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(place):
    """A limit on the size of files stands for the full disk: what writes beyond it fails in the middle."""
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); "
        f"sys.path.insert(0, {str(ROOT)!r}); from jointopt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    write_config(place, output="runs/full")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for limit in (20_000, 60_000, 120_000):
        words = [sys.executable, "-c", limited, str(limit), "run", "config.yaml"]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stdout
        assert "Traceback" not in done.stderr
        said = [line for line in done.stderr.splitlines() if not re.match(r"W\d{4} ", line)]  # libraries' own log
        assert len(said) == 1, done.stderr
        assert not (place / "runs/full/export").exists()
    done = at_once("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "runs/full/export/jointopt.json").read_text())["metrics"]


@pytest.mark.slow
def test_a_run_finishes_the_top_of_its_front_and_a_second_one_finds_it_done(place):
    write_config(place, output="runs/finished", finish={"rounding": "gptq", "top": 2}, choose={"size_mb": 1})
    done = at_once("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "finished (gptq, " in done.stdout
    study = Study.open(place / "runs/finished/study.db")
    assert len(study.finished()) == 2
    assert study.fact("verified") == "verified"
    record = json.loads((place / "runs/finished/export/jointopt.json").read_text())
    assert record["rounding"] == study.fact("choice")["rounding"]
    assert "Finished sub-networks" in (place / "runs/finished/report.html").read_text()
    written = (place / "runs/finished/export/model.safetensors").stat().st_mtime_ns
    again = at_once("run", "config.yaml", cwd=place)
    assert again.returncode == 0, again.stderr
    assert "finished (gptq, " not in again.stdout
    assert (place / "runs/finished/export/model.safetensors").stat().st_mtime_ns == written
    number = int(study.evaluations()["number"].iloc[-1])
    picked = at_once("export", "runs/finished", "--pick", number, "--to", place / "picked", cwd=place)
    assert picked.returncode == 0, picked.stderr
    assert len(study.finished()) in (2, 3)


@pytest.mark.slow
def test_finishing_with_other_settings_is_done_anew_and_training_data_come_later(place, capsys, monkeypatch):
    write_config(place, output="runs/later", search={"evaluations": 4}, choose={"size_mb": 1})
    assert at_once("run", "config.yaml", cwd=place).returncode == 0

    def finishes(rate: float) -> str:
        data = {"train": "images", "calibrate": "images", "evaluate": "images", "batch_size": 12}
        finish = {"steps": 2, "learning_rate": rate, "batch_size": 4, "top": 1}
        search, choose = {"evaluations": 4}, {"size_mb": 1}
        write_config(place, output="runs/later", data=data, finish=finish, search=search, choose=choose)
        done = at_once("run", "config.yaml", "--overwrite", cwd=place)
        assert done.returncode == 0, done.stderr
        assert "\nverified: " in done.stdout
        return done.stdout

    assert "finished (trained-2-" in finishes(1e-3)
    assert "finished (trained-2-" in finishes(1e-6)
    assert "finished (trained-2-" not in finishes(1e-6)
    study = Study.open(place / "runs/later/study.db")
    assert len({each["rounding"] for each in study.finished()}) == 2


def test_a_wish_that_cannot_be_is_refused_before_training_and_costs_none(place, capsys, monkeypatch):
    data = {"train": "images", "evaluate": "images", "batch_size": 12}
    rest = {"data": data, "train": {"steps": 2, "batch_size": 4}, "search": {"evaluations": 3}, "output": "runs/typo"}
    for wish, said in {
        "acuracy": "constraints: found 'acuracy'; did you mean 'accuracy'?; allowed: size_mb",
        "size_mb": "constraint size_mb <= 0.0001: no genome meets it",
    }.items():
        write_config(place, constraints={wish: "<= 0.0001"}, **rest)
        assert said in refused(capsys, place, monkeypatch, "run", "config.yaml")
        assert not (place / "runs/typo/supernet.safetensors").exists()
    write_config(place, **rest)
    done = at_once("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    (place / "runs/typo/study.db").unlink()
    written = (place / "runs/typo/supernet.safetensors").stat().st_mtime_ns
    write_config(place, constraints={"accuracy": ">= 0.1"}, **rest)
    again = at_once("run", "config.yaml", "--overwrite", cwd=place)
    assert again.returncode == 0, again.stderr
    assert (place / "runs/typo/supernet.safetensors").stat().st_mtime_ns == written


def test_finishing_knows_its_keys(place, capsys, monkeypatch):
    write_config(place, finish={"rounding": "gptqq"})
    assert "finish.rounding: found 'gptqq'" in refused(capsys, place, monkeypatch, "run", "config.yaml")
    write_config(place, finish={"top": 0})
    assert "finish.top: found 0; allowed: more than 0" in refused(capsys, place, monkeypatch, "run", "config.yaml")


@pytest.mark.slow
def test_nothing_of_the_libraries_inside_its_workers_does_either(place):
    write_config(place, output="runs/two", search={"evaluations": 2, "workers": 2})
    done = command("run", "config.yaml", cwd=place)
    assert done.returncode == 0
    assert done.stderr == ""
