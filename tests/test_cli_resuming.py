"""A command that is given again: it goes on where it stopped, does nothing twice, and is held to its config."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from jointopt import Gene, JointoptError, Objective, SearchSpace, Study, Supernet
from jointopt.cli import main
from jointopt.config.config import load_config
from jointopt.files import locked
from jointopt.prepared import prepare
from jointopt.run_folder import CHECKPOINT, LOCK, STUDY, check_output, taken
from jointopt.training import loop
from jointopt.workflow import make_supernet
from tests.commands import ROOT, at_once, heed_ctrl_c, refused, write_config
from tests.saved import save_vit, write_images


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


def test_a_training_whose_result_cannot_be_saved_is_not_lost(place, capsys, monkeypatch):
    def full(supernet: Supernet, path: Path) -> None:
        raise JointoptError(f"{str(path)!r} cannot be written: No space left on device")

    data = {"train": "images", "evaluate": "images", "batch_size": 12}
    write_config(place, output="runs/kept", data=data, train={"steps": 3, "batch_size": 4}, search={"evaluations": 2})
    monkeypatch.chdir(place)
    with monkeypatch.context() as disk:
        disk.setattr(Supernet, "save", full)
        assert main(["run", "config.yaml"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    checkpoint = Path("runs/kept/training.safetensors")
    assert checkpoint.is_file()
    monkeypatch.setattr(loop, "gradients_of", lambda *arguments: pytest.fail("trained anew"))
    assert main(["run", "config.yaml"]) == 0
    assert Path("runs/kept/supernet.safetensors").is_file() and not checkpoint.exists()


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


def test_ranges_are_chosen_as_the_config_says_in_search_and_export_and_no_otherwise_later(
    place, tmp_path, capsys, monkeypatch
):
    space = {"depth": [1, 2], "schemes": ["W4A16", "W8A8_STATIC"]}
    chosen = {"weight_calibration": "mse", "activation_calibration": "percentile"}
    settings = {"output": "runs/ranges", "space": space, "search": {"evaluations": 3}}
    write_config(place, **settings, **chosen)
    done = at_once("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    with contextlib.chdir(place):
        config = load_config("config.yaml")
        supernet = make_supernet(config, prepare(config))
    assert [supernet.weight_calibration, supernet.activation_calibration] == list(chosen.values())
    assert Study.open(place / "runs/ranges" / STUDY).config["supernet"] == supernet.fingerprint()
    other = at_once("export", "runs/ranges", "--pick", 1, "--to", tmp_path / "export", cwd=place)
    assert other.returncode == 0, other.stderr
    verified = at_once("verify", tmp_path / "export", "--config", "runs/ranges/config.yaml", cwd=place)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    for key, method in chosen.items():
        write_config(place, **settings, **{**chosen, key: "minmax"})
        said = refused(capsys, place, monkeypatch, "run", "config.yaml")
        assert f'{key} was "{method}", is ' in said


DEEP = "a/" * 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_calibration": "entropy"}, 'activation_calibration was "mse", is "entropy"; allowed'),
        ({"weight_calibration": "mse"}, 'weight_calibration was "minmax", is "mse"; allowed'),
        ({"train": {"steps": 3}}, "config: train.steps was null, is 3"),
        (
            {"objectives": ["accuracy", "size", "macs"]},
            'objectives was ... "direction": "min"}], is ... "direction": "min"}, {"name": "macs", "',
        ),
        (
            {"data": {"train": "images", "calibrate": "images", "evaluate": DEEP + "c"}},
            f'data.evaluate.path was ...{DEEP[-20:]}b", is ...{DEEP[-20:]}c"; allowed',
        ),
    ],
)
def test_a_refused_config_is_told_by_what_both_say_from_where_they_differ(tmp_path, changes, said):
    folder = tmp_path / "run"

    def config(**changes):
        data = {"train": "images", "calibrate": "images", "evaluate": DEEP + "b"}
        return load_config(write_config(tmp_path, **{"data": data, **changes}), {"output": str(folder)})

    folder.mkdir()
    (folder / "config.yaml").write_text(config().to_yaml())
    (folder / STUDY).touch()
    check_output(config())
    with pytest.raises(JointoptError, match=re.escape(said)):
        check_output(config(**changes))


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


def test_a_super_network_taught_by_another_teacher_is_not_gone_on_with(place, capsys, monkeypatch):
    save_vit(place / "teacher")
    data = {"train": "images", "evaluate": "images", "batch_size": 12}
    train = {"steps": 2, "batch_size": 4, "distill": {"teacher": "teacher"}}
    write_config(place, output="runs/pupil", data=data, train=train, search={"evaluations": 2})
    assert at_once("run", "config.yaml", cwd=place).returncode == 0
    weights = place / "teacher/model.safetensors"
    save_file({name: 2 * each for name, each in load_file(weights).items()}, weights, {"format": "pt"})
    said = refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert "train.distill.teacher: has other contents than the super-network in 'runs/pupil' was trained with" in said
    assert at_once("export", "runs/pupil", "--pick", 1, "--to", "runs/taught-one", cwd=place).returncode == 0
    shutil.rmtree(place / "teacher")  # it is needed no more
    assert at_once("run", "config.yaml", cwd=place).returncode == 0


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
