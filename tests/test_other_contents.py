"""Data of other contents under the same name: what was scored or finished on the earlier ones is done anew."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jointopt import JointoptError, Study
from jointopt.cli import main
from jointopt.config.config import Config
from jointopt.config.sections import Data, Source, Train
from jointopt.prepared import PROCESSED, prepare
from jointopt.rows import DataSource, read_columns
from jointopt.study.rescoring import rescored
from jointopt.training import loop
from tests.saved import LABELS, save_bert, save_vit, write_images, write_reviews


def run_on_images(folder: Path, monkeypatch, more: str = "", data: str = ", test: test") -> Study:
    """The study of `jointopt run` in a folder with a model and images, which are made where they are not there."""
    write_run(folder, more, data)
    monkeypatch.chdir(folder)
    assert main(["run", "config.yaml"]) == 0
    return Study.open("out/study.db")


def write_run(folder: Path, more: str = "", data: str = "") -> None:
    for seed, name in enumerate(("taught", "seen", "scored", "test")):
        if not (folder / name).exists():
            write_images(folder / name, seed=seed)
    if not (folder / "vit").exists():
        save_vit(folder / "vit")
    text = (
        "{model: vit, task: image-classification, device: cpu, dtype: float32, output: out, objectives: [loss, size], "
        "space: {depth: [1, 2], schemes: [none, W4A16]}, search: {evaluations: 4}, choose: {size_mb: 1}, "
        f"data: {{train: taught, calibrate: seen, evaluate: scored, batch_size: 12{data}}}"
    )
    (folder / "config.yaml").write_text(f"{text}{more}}}")


def blacken(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        Image.new("L", (8, 8)).save(path)


@pytest.mark.slow
def test_other_unseen_images_under_the_same_name_are_scored_anew(tmp_path, monkeypatch, capsys):
    before = rescored(run_on_images(tmp_path, monkeypatch))
    blacken(tmp_path / "test")
    capsys.readouterr()
    after = rescored(run_on_images(tmp_path, monkeypatch))
    assert set(after) == set(before)
    assert all(after[genome]["metrics"] != before[genome]["metrics"] for genome in before)
    assert f"{after[None]['metrics']['loss']:,.6g} ±" in capsys.readouterr().out


@pytest.mark.slow
def test_a_config_that_names_no_unseen_images_any_longer_leaves_no_scores_on_them(tmp_path, monkeypatch, capsys):
    assert rescored(run_on_images(tmp_path, monkeypatch))
    capsys.readouterr()
    assert not rescored(run_on_images(tmp_path, monkeypatch, data=""))
    assert "unseen data" not in capsys.readouterr().out + Path("out/report.html").read_text()


@pytest.mark.slow
def test_what_was_finished_on_other_images_under_the_same_name_is_finished_and_scored_anew(tmp_path, monkeypatch):
    finish = ", finish: {steps: 3, top: 1, batch_size: 4, learning_rate: 0.001}"
    study = run_on_images(tmp_path, monkeypatch, finish)
    (before,) = study.finished()
    number = 1 + study.evaluations()["genome"].tolist().index(tuple(before["genome"]))
    blacken(tmp_path / "taught")
    assert main(["export", "out", "--pick", str(number), "--to", "again"]) == 0
    _, after = study.finished()
    assert after["genome"] == before["genome"] and after["rounding"] != before["rounding"]
    record = json.loads(Path("again/jointopt.json").read_text())
    assert record["rounding"] in (after["rounding"], "nearest")
    assert main(["verify", "again", "--config", "out/config.yaml"]) == 0


def test_a_training_that_ended_early_does_not_go_on_with_other_images_under_the_same_name(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "EVERY", 1)
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, ", train: {steps: 9, batch_size: 4, learning_rate: 1.0e+30}")  # the second step's loss is none
    assert main(["run", "config.yaml"]) == 2 and Path("out/training.safetensors").is_file()
    blacken(tmp_path / "taught")
    capsys.readouterr()
    assert main(["run", "config.yaml"]) == 2
    assert "training.safetensors' was written by another training, with another data.train" in capsys.readouterr().err


@pytest.mark.parametrize("test", ["./scored/", "{path: scored, samples: 9}", "copy", "taught"])
def test_unseen_images_that_the_search_does_see_are_refused(test, tmp_path, monkeypatch, capsys):
    write_run(tmp_path, ", train: {steps: 9, batch_size: 4}", f", test: {test}")
    shutil.copytree(tmp_path / "scored", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "config.yaml"]) == 2
    told = r"data.test: (\d+) of its \1 samples are in data.(evaluate|train) too; allowed: samples that the search does"
    assert re.search(told, capsys.readouterr().err)


def unseen(folder: Path, lines: list[str]) -> None:
    """Prepares a config whose unseen texts, of the 40 that are searched with and of others, are these lines."""
    (folder / "unseen.csv").write_text("\n".join(["text,label", *lines]))
    data = {name: Source(path=str(folder / "seen.csv")) for name in ("calibrate", "evaluate")}
    data["test"] = Source(path=str(folder / "unseen.csv"))
    prepare(Config(model=str(folder / "bert"), task="text-classification", data=Data(**data), device="cpu", output="o"))


def test_unseen_texts_may_be_the_same_by_chance_as_few_as_are_told(tmp_path, recwarn):
    save_bert(tmp_path / "bert")
    _, *seen = write_reviews(tmp_path / "seen.csv").read_text().splitlines()
    _, *others = write_reviews(tmp_path / "others.csv", seed=1).read_text().splitlines()
    alone = [line for line in seen if seen.count(line) == 1]
    others = [line for line in others if line not in seen]
    unseen(tmp_path, others)
    assert not recwarn.list
    unseen(tmp_path, others[:20] + alone[:5])
    assert "data.test: 5 of its 25 samples are in data.evaluate too" in [str(each.message) for each in recwarn]
    with pytest.raises(JointoptError, match=r"^data.test: 5 of its 9 samples are in data.evaluate too; allowed: "):
        unseen(tmp_path, others[:4] + alone[:5])


def trained_on(folder: Path, model: Path, task: str) -> str:
    data = Data(train=Source(path=str(folder)), evaluate=Source(path=str(folder)))
    config = Config(model=str(model), task=task, data=data, train=Train(steps=1), device="cpu", output="out")
    return prepare(config).trained_on


def test_another_label_of_any_text_is_other_training_data(tmp_path):
    model, count = save_bert(tmp_path / "bert"), 2 * PROCESSED
    lines = write_reviews(tmp_path / "reviews.csv", count).read_text().splitlines()
    before = trained_on(tmp_path / "reviews.csv", model, "text-classification")
    last = 1 + np.random.default_rng([0, 0]).permutation(count)[-1]  # of the first epoch, behind a header
    text, label = lines[last].split(",")
    lines[last] = f"{text},{LABELS[1 - LABELS.index(label)]}"
    (tmp_path / "reviews.csv").write_text("\n".join(lines))
    assert trained_on(tmp_path / "reviews.csv", model, "text-classification") != before


@pytest.mark.slow
def test_another_file_among_images_is_other_training_data_and_a_copy_is_not(tmp_path):
    model, images = save_vit(tmp_path / "vit"), write_images(tmp_path / "images", each=PROCESSED // 3 + 1)
    before = trained_on(images, model, "image-classification")
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    assert trained_on(tmp_path / "copy", model, "image-classification") == before
    files = read_columns(DataSource(str(images)))["image"]
    Image.new("L", (8, 8)).save(files[np.random.default_rng([0, 0]).permutation(len(files))[-1]])
    assert trained_on(images, model, "image-classification") != before


@pytest.mark.slow
def test_an_export_of_what_was_searched_on_other_images_under_the_same_name_is_refused(tmp_path, monkeypatch, capsys):
    run_on_images(tmp_path, monkeypatch)
    blacken(tmp_path / "scored")
    assert main(["export", "out", "--pick", "knee", "--to", "again"]) == 2
    assert "export: the model or its data are no longer what" in capsys.readouterr().err
