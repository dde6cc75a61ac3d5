"""What a user has set for code of their own changes nothing that is measured, rounded or written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.checkpoint.exporting import RECORD
from jointopt.evaluation.evaluation import evaluate
from tests.zoo import batches, logits, make, supernet_of

SCHEMES = ("none", "W8A8", "W8A8_STATIC", "W4A16")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def everything(folder: Path, surroundings: AbstractContextManager) -> dict[str, Any]:
    """What comes of calibrating, finishing and exporting a float32 model within the surroundings."""
    model, given = make("bert"), batches("bert")
    with surroundings:
        space = SearchSpace.for_model(model, schemes=SCHEMES)
        supernet = Supernet(model, space, repair=True, activation_calibration="mse")
        supernet.calibrate(given)
        finished = jointopt.finish(supernet, space.smallest, given, rounding="gptq")
        learned = jointopt.finish(supernet, space.smallest, given, rounding="learned")
        jointopt.export(supernet, finished, folder / "folder")
        jointopt.export(supernet, space.smallest, folder / "onnx", target="onnxruntime")
        differences = [jointopt.verify(folder / each).differences for each in ("folder", "onnx")]
    return {
        "calibration": supernet.fingerprint(),
        "costs": supernet.costs(space.smallest),
        "learned": logits(learned.model, given[0]).tolist(),
        "finished": hashlib.sha256((folder / "folder" / "model.safetensors").read_bytes()).hexdigest(),
        "probe": json.loads((folder / "folder" / RECORD).read_text())["probe"],
        "onnx": hashlib.sha256((folder / "onnx" / "model.onnx").read_bytes()).hexdigest(),
        "differences": differences,
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    found = everything(tmp_path_factory.mktemp("alone"), nullcontext())
    assert found["differences"] == [(), ()]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_no_bit_of_a_float32_model(alone, tmp_path, dtype):
    assert everything(tmp_path, default_dtype(dtype)) == alone


@pytest.mark.parametrize("name", ["vit", "timm_vit", "resnet"])
def test_costs_before_calibration_are_counted_under_another_default_dtype(name):
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model))
    expected = supernet.costs(supernet.space.largest)
    with default_dtype(torch.bfloat16):
        other = Supernet(model, supernet.space)
        assert other.costs(supernet.space.largest) == expected


def test_autocast_around_it_changes_no_bit(alone, tmp_path):
    assert everything(tmp_path, torch.autocast("cpu", torch.bfloat16)) == alone


@contextmanager
def fewer_bits() -> Iterator[None]:
    """As scripts that train on GPUs begin; a CPU takes bfloat16, where it has that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_in_fewer_bits_around_it_change_no_bit(alone, tmp_path):
    assert everything(tmp_path, fewer_bits()) == alone


def settings() -> list[object]:
    """torch's, of how float32 is computed, the older and the newer ones."""
    backends = torch.backends
    newer = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    older = (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32)
    return [each.fp32_precision for each in newer] + list(older)


def test_quality_functions_see_float32_in_full_and_the_caller_has_settings_of_before_again():
    supernet, seen = supernet_of("bert", ["none", "W8A8"], preset="fixed"), []

    def quality(model: torch.nn.Module) -> float:
        seen.append(settings())
        raise ValueError("whatever happens in it")

    with fewer_bits():
        before = settings()
        found = evaluate(supernet, supernet.space.largest, quality)
        assert settings() == before and found.failed is not None
    assert seen == [["ieee"] * 5 + ["highest", False, False]]


NEWER = """
import torch
from torch import backends
from jointopt.arithmetic import full_float32
backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"
with full_float32():
    print(backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
print(backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
"""


def test_float32_is_full_too_where_the_caller_has_used_the_newer_settings_alone():
    done = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "ieee", "tf32", "tf32"]


def test_statistics_of_normalizations_are_estimated_without_autocast():
    supernet = supernet_of("resnet", ["none", "W8A8"])
    genome = supernet.space.smallest
    expected = supernet.extract(genome).state_dict()
    supernet.calibrate(batches("resnet"))
    with torch.autocast("cpu", torch.bfloat16):
        found = supernet.extract(genome).state_dict()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_a_quality_function_is_run_with_the_autocast_that_it_is_called_in():
    supernet = supernet_of("bert", ["none", "W8A8"], preset="fixed")
    seen = []

    def quality(model: torch.nn.Module) -> float:
        seen.append(logits(model, batches("bert")[0]).dtype)
        return 1.0

    with torch.autocast("cpu", torch.bfloat16):
        jointopt.finish(supernet, supernet.space.smallest, batches("bert"), quality=quality)
    assert seen == [torch.bfloat16]
