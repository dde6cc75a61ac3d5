"""Runs for ONNX Runtime, as commands: what they export, time and report."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tests.commands import at_once
from tests.saved import save_vit, write_images

CONFIG = {
    "model": "vit",
    "task": "image-classification",
    "data": {"calibrate": "images", "evaluate": "images", "batch_size": 12},
    "space": {"depth": [1, 2]},
    "target": "onnxruntime",
    "hardware": {"device": "cpu-avx2"},
    "objectives": ["accuracy", "latency"],
    "search": {"evaluations": 6},
    "device": "cpu",
    "output": "runs/vit",
}
TIMED = {**CONFIG, "hardware": {"device": "this", "batch": 2}, "output": "runs/here"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a model and its images, and of what runs leave."""
    made = tmp_path_factory.mktemp("configs")
    save_vit(made / "vit")
    write_images(made / "images")
    return made


def run(folder: Path, config: dict, *words: object) -> CompletedProcess:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return at_once("run", "config.yaml", *words, cwd=folder)


@pytest.fixture(scope="module")
def ran(folder) -> str:
    """What a run for ONNX Runtime printed."""
    done = run(folder, CONFIG)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_config_that_targets_onnx_runtime_exports_model_onnx(folder, ran):
    assert "verified: runs/vit/export" in ran
    assert (folder / "runs/vit/export/model.onnx").is_file()
    assert "roofline of CPU, 2 cores with AVX2" in (folder / "runs/vit/report.html").read_text()


def test_its_report_shows_other_devices(folder, ran):
    report = at_once("report", "runs/vit", "--device", "orin", "--device", "h100", cwd=folder)
    assert report.returncode == 0, report.stderr
    assert "Jetson AGX Orin" in report.stdout and "H100" in report.stdout


def test_another_target_s_export_of_it_is_made_too(folder, ran):
    other = at_once("export", "runs/vit", "--pick", "1", "--to", "plain", "--target", "transformers", cwd=folder)
    assert other.returncode == 0, other.stderr
    assert (folder / "plain/model.safetensors").is_file()


def test_latency_of_this_machine_is_measured_and_a_run_goes_on_by_it(folder):
    timed = run(folder, TIMED)
    assert timed.returncode == 0, timed.stderr
    assert "ms measured" in timed.stdout and "off where it was fitted end to end" in timed.stdout
    again = run(folder, TIMED, "--evaluations", "8")
    assert again.returncode == 0, again.stderr


def test_latency_of_this_machine_is_measured_in_torch(folder):
    space = {"depth": [1, 2], "schemes": ["none", "W4A16"]}
    timed = run(folder, {**TIMED, "space": space, "target": "transformers", "output": "runs/torch"})
    assert timed.returncode == 0, timed.stderr
    assert "verified: runs/torch/export" in timed.stdout
    assert "ms measured" in timed.stdout and ", torch 2." in timed.stdout
    assert "ompressing" not in timed.stdout + timed.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"constraints": {"latency_ms": "<= 5"}}, "found 'latency_ms'; did you mean 'latency'?"),
        ({"target": "gguf"}, "allowed: transformers, onnxruntime, which are timed"),
        ({"space": {"schemes": ["none", "NVFP4"]}}, "target onnxruntime: NVFP4 has no form there; allowed: none, W8A8"),
    ],
)
def test_what_the_target_cannot_do_is_refused_before_anything_is_timed(folder, changes, said):
    early = run(folder, {**TIMED, "output": "runs/slip", **changes})
    assert early.returncode == 2 and said in early.stderr
    assert not (folder / "runs/slip/latency.json").exists()
