"""A run that finishes what it chose: the top of its front, once, and anew where its settings are others."""

from __future__ import annotations

import json

import pytest

from jointopt import Study
from tests.commands import at_once, write_config


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
