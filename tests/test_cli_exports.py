"""Exports by command: which point is taken, what they may replace, and what verify finds in those that were changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jointopt import Study
from jointopt.cli import main
from jointopt.study.rescoring import rescored
from tests.commands import at_once, command, finished_run, refused, user_place, write_config
from tests.saved import save_bert, save_llama, write_images, write_reviews


def test_another_point_of_the_front_is_exported_and_verified(finished, tmp_path):
    place = finished.parents[1]
    number = int(Study.open(finished / "study.db").front()["number"].iloc[-1])
    done = command("export", "runs/vit", "--pick", number, "--to", tmp_path / "picked", cwd=place)
    assert done.returncode == 0, done.stderr
    verified = command("verify", tmp_path / "picked", "--config", "runs/vit/config.yaml", cwd=place)
    assert verified.returncode == 0, verified.stdout
    assert verified.stdout.startswith(f"verified: {tmp_path / 'picked'}: accuracy ")


def test_verify_finds_packages_where_the_command_itself_does(finished):
    """As after `pip install --user`, or where a cluster's modules set PYTHONPATH."""
    paths = [str(Path(__file__).parents[1]), sysconfig.get_path("purelib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = [sys._base_executable, "-m", "jointopt", "verify", "runs/vit"]  # type: ignore[attr-defined]
    done = subprocess.run(words, cwd=finished.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("verified: runs/vit/export: accuracy ")


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
    (tmp_path / "nan/jointopt.json").write_text("[]")
    done = at_once("verify", tmp_path / "nan", cwd=place)
    assert (
        done.returncode == 2
        and "has no choices, probe, costs, layers" in done.stderr
        and "Traceback" not in done.stderr
    )


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
        ((), {"supernet": "0" * 32}, "holds a sub-network of another super-network; --overwrite replaces it"),
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


def test_an_export_of_other_weights_is_not_taken_for_the_run_s_where_its_study_is_gone(tmp_path, capsys, monkeypatch):
    finished_run(user_place(tmp_path))
    (tmp_path / "runs/vit/study.db").unlink()
    weights = tmp_path / "vit/model.safetensors"
    save_file({name: 2 * each for name, each in load_file(weights).items()}, weights, {"format": "pt"})
    said = refused(capsys, tmp_path, monkeypatch, "run", "config.yaml")
    assert "'runs/vit/export' exists and holds a sub-network of another super-network; --overwrite replaces it" in said
    assert not (tmp_path / "runs/vit/study.db").exists()
    assert at_once("run", "config.yaml", "--overwrite", cwd=tmp_path).returncode == 0


def test_an_export_with_other_scores_is_not_taken_for_the_run_s(copied, capsys, monkeypatch):
    assert main(["run", "config.yaml", "--overwrite"]) == 0
    record = copied / "export/jointopt.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"metrics": {"accuracy": 2.0}}))
    said = refused(capsys, copied.parents[1], monkeypatch, "run", "config.yaml")
    assert "'runs/copied/export' exists and holds this model with other scores; --overwrite replaces it" in said


def test_the_card_tells_scores_on_unseen_data_and_an_export_without_them_is_written_again(finished, monkeypatch):
    place = finished.parents[1]
    monkeypatch.chdir(place)
    shutil.copytree(finished, "runs/tested")
    data = {"calibrate": "images", "evaluate": "images", "test": "unseen", "batch_size": 12}
    for seed in (8, 9):
        shutil.rmtree("unseen", ignore_errors=True)
        write_images(place / "unseen", seed=seed)
        write_config(place, output="runs/tested", data=data)
        assert main(["run", "config.yaml"]) == 0
        study = Study.open("runs/tested/study.db")
        found, original = rescored(study)[tuple(study.fact("choice")["genome"])], rescored(study)[None]
        study.close()
        card = Path("runs/tested/export/README.md").read_text()
        told = [f"{each['metrics']['accuracy']:.6g}" for each in (found, original)]
        assert f"| accuracy, unseen data | {' | '.join(told)} |\n" in card
    written = Path("runs/tested/export/jointopt.json").stat().st_mtime_ns
    assert main(["run", "config.yaml"]) == 0
    assert Path("runs/tested/export/jointopt.json").stat().st_mtime_ns == written
