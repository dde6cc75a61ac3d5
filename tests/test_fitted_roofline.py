"""A roofline fitted to operators' times: what it was made from is found again, with its kernels and end to end."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import jointopt
from jointopt import Family, JointoptError, Layer, Roofline, SearchSpace, Supernet, load_device
from jointopt.cost.operators import Operator, check_kernel
from jointopt.timing.backend import Backend
from jointopt.timing.lookup import key_of, operators_of
from quant.formats import SCHEMES, Format, Scheme, scheme
from tests.zoo import batches, make

pytest.importorskip("onnxruntime")


@cache
def supernet() -> Supernet:
    model = make("resnet")
    found = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8", "W8A8_STATIC"]))
    found.calibrate(batches("resnet"))
    return found


def told(path: Path) -> Roofline:
    """A machine whose dynamic integer convolutions are slow, and the file of its operators' times."""
    device = load_device("cpu-avx2")
    slow = device.model_copy(
        update={"kernels": {"conv 3x3 W8A8": 1e9, "conv 1x1 none": 2e10, "conv 3x3 none": 5e9}, "overhead": 2e-6}
    )
    truth = Roofline(slow, batch=4)
    seconds = {key_of(each, 4): truth.answer(each).seconds for each in operators_of(supernet(), 4)}
    path.write_text(json.dumps({"machines": {Backend().machine: seconds}}))
    return truth


def latencies(model: Roofline, genomes: np.ndarray) -> np.ndarray:
    return supernet().costs_by(model).columns(genomes)["latency"]


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (Operator("linear", 8, 8, 4, scheme=scheme("W4A16_G64")), "linear W4A16"),
        (Operator("attention", 8, 8, 4, context=4, heads=2), "attention none"),
        (Operator("conv", 8, 8, 4, area=9), "conv 3x3 none"),
        (Operator("conv", 8, 1, 4, area=25, heads=8, scheme=scheme("W8A8")), "conv 5x5 grouped W8A8"),
        (
            Operator("conv", 8, 8, 4, scheme=scheme("W8A8_STATIC"), reader=scheme("W8A8_STATIC")),
            "conv 1x1 W8A8_STATIC fused",
        ),
    ],
)
def test_a_kernel_is_named_by_what_is_computed_and_in_which_formats(operator, name):
    assert operator.kernel == name
    check_kernel(name)


def test_it_comes_close_to_the_machine_that_it_is_fitted_to(tmp_path):
    truth = told(tmp_path / "operators.json")
    found = jointopt.fit_roofline(supernet(), batch=4, operators=40, path=tmp_path / "operators.json")
    genomes = supernet().space.sample(30, seed=0)
    np.testing.assert_allclose(latencies(found, genomes), latencies(truth, genomes), rtol=0.1)
    assert found.device.kernels["conv 3x3 W8A8"] < found.device.kernels["conv 3x3 none"] / 2
    assert "fitted to 40 operators" in found.source and found.error is None


def test_what_a_graph_does_to_its_operators_is_one_factor_and_the_error_is_told(tmp_path):
    truth = told(tmp_path / "operators.json")
    genomes = supernet().space.sample(6, seed=1)
    fitted = truth.fit(supernet(), list(genomes), list(0.7 * latencies(truth, genomes)))
    np.testing.assert_allclose(latencies(fitted, genomes), 0.7 * latencies(truth, genomes), rtol=1e-6)
    assert fitted.error == pytest.approx(0, abs=1e-6) and "0% off" in fitted.source
    wrong = truth.fit(supernet(), list(genomes), list(latencies(truth, genomes) * np.array([1, 1, 1, 1, 1, 2])))
    factor = 5.5 / 5.25  # of least squared relative errors
    np.testing.assert_allclose(latencies(wrong, genomes), factor * latencies(truth, genomes), rtol=1e-6)
    assert wrong.error == pytest.approx((5 * (factor - 1) + (1 - factor / 2)) / 6)


def test_several_devices_are_slower_by_all_that_they_do():
    two = Roofline(load_device("a100"), batch=4, parallel=2)
    genomes = supernet().space.sample(4, seed=2)
    fitted = two.fit(supernet(), list(genomes), list(3 * latencies(two, genomes)))
    np.testing.assert_allclose(latencies(fitted, genomes), 3 * latencies(two, genomes), rtol=1e-6)


def test_a_fitted_device_is_saved_as_one_of_one_s_own(tmp_path):
    device = told(tmp_path / "operators.json").device
    device.save(tmp_path / "mine.yaml")
    assert load_device(str(tmp_path / "mine.yaml")) == device


def test_operators_are_timed_for_real_and_kept(tmp_path):
    path = tmp_path / "operators.json"
    found = jointopt.fit_roofline(supernet(), batch=1, operators=20, path=path)
    (seconds,) = json.loads(path.read_text())["machines"].values()
    assert len(seconds) == 20 and (latencies(found, supernet().space.sample(5, seed=0)) > 0).all()


def test_each_kind_in_each_scheme_is_timed(tmp_path):
    told(tmp_path / "operators.json")
    found = jointopt.fit_roofline(supernet(), batch=4, operators=8, path=tmp_path / "operators.json")
    assert set(found.device.kernels) == {each.kernel for each in operators_of(supernet(), 4) if each.macs}


@pytest.mark.parametrize("name", ["my-w8", "MINE_G7"])
def test_a_fitted_device_with_a_scheme_of_one_s_own_is_saved_and_read_again(name, tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEMES, name, Scheme(name, Format("int8", "channel")))
    kernel = Operator("linear", 4, 4, 1.0, scheme=scheme(name)).kernel
    device = load_device("cpu-avx2").model_copy(update={"kernels": {kernel: 1e9}})
    device.save(tmp_path / "mine.yaml")
    assert kernel == f"linear {name}" and load_device(tmp_path / "mine.yaml").kernels == {kernel: 1e9}


def test_too_little_to_fit_by_is_refused(tmp_path):
    def declare(model: nn.Module) -> Family:
        return Family(
            "line", (), (), (Layer("line", "0", "line"),), example=lambda model: {"input": torch.zeros(2, 32)}
        )

    model = nn.Sequential(nn.Linear(32, 32))
    small = Supernet(model, SearchSpace.for_model(model, family=declare, schemes=["none", "W8A8"]), family=declare)
    with pytest.raises(JointoptError, match="found 2 operators to time; allowed: 8 or more"):
        jointopt.fit_roofline(small, path=tmp_path / "operators.json")
    largest = supernet().space.largest
    with pytest.raises(JointoptError, match="roofline: found 1 times to fit by; allowed: 2 or more"):
        Roofline(load_device("l4")).fit(supernet(), [largest], [1e-3])
    with pytest.raises(JointoptError, match="roofline: found a time of 0.0 s; allowed: above 0"):
        Roofline(load_device("l4")).fit(supernet(), [largest, largest], [1e-3, 0.0])
    with pytest.raises(JointoptError, match="roofline: found genomes of several shapes"):
        Roofline(load_device("l4")).fit(supernet(), [largest, largest[1:]], [1e-3, 1e-3])
    with pytest.raises(JointoptError, match="genome: found shape"):
        Roofline(load_device("l4")).fit(supernet(), [largest[1:], largest[1:]], [1e-3, 1e-3])


def test_a_device_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(JointoptError, match="cannot be written: No such file"):
        load_device("l4").save(tmp_path / "nowhere" / "l4.yaml")
