"""Learned ranges of static inputs: gradients are LSQ's, and calibrations leave what was trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jointopt
from jointopt import SearchSpace, Supernet
from quant.calibration import static_constants
from quant.formats import Format
from quant.kernels import fake_quantize_activation
from quant.learned_ranges import ends, input_range, learn_input_range, widened
from quant.reference import quantize
from tests.test_learned_ranges import RECIPE, by_autograd, digits, digits_vit_with_outliers, distance_from
from tests.test_training import calibrated, labelled
from tests.zoo import batches

STATIC = {
    "int8": Format("int8", "tensor", dynamic=False),
    "int8 with a zero point": Format("int8", "tensor", symmetric=False, dynamic=False),
    "fp8": Format("fp8_e4m3", "tensor", dynamic=False),
}


@pytest.mark.parametrize("form", STATIC.values(), ids=STATIC)
def test_gradients_of_inputs_are_those_of_the_paper(form):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 32, generator=generator).requires_grad_(True)
    factor = torch.tensor([0.5, 0.7])[: ends(form), None, None].requires_grad_(True)
    clip = widened((x.detach().min(), x.detach().max()), factor.detach().flatten())
    constants = {"input_zero_point": None, **static_constants(clip, form)}
    held = fake_quantize_activation(x.detach(), form, constants["input_scale"], constants["input_zero_point"])
    arriving = torch.randn(x.shape, generator=generator)
    found = torch.autograd.grad(learn_input_range(x, held, form, constants, factor), (x, factor), arriving)
    codes = quantize(x.detach().flatten()[None], form, clip)
    assert torch.equal(codes.dequantize().flatten(), held.flatten())
    expected = torch.autograd.grad(by_autograd(x.flatten()[None], codes, factor).view_as(x), (x, factor), arriving)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert (found[0] == 0).any() and (found[1] != 0).all()


@pytest.mark.parametrize("form", STATIC.values(), ids=STATIC)
@given(low=st.floats(-1e4, -1e-4), high=st.floats(1e-4, 1e4))
def test_the_range_of_constants_gives_the_same_constants(form, low, high):
    constants = static_constants((torch.tensor(low), torch.tensor(high)), form)
    again = static_constants(input_range(form, constants), form)
    assert constants.keys() == again.keys()
    for name, tensor in constants.items():
        assert torch.equal(tensor, again[name])


def constants_of(supernet: Supernet) -> dict:
    whole = supernet.plan(supernet.space.largest).schemes
    return {path: dict(supernet.constants(path, each)) for path, each in whole.items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[path][name]) for path, found in one.items() for name, tensor in found.items()
    )


@pytest.mark.parametrize("name", ["vit", "resnet", "llama_tied"])
def test_ranges_of_inputs_stay_as_they_were_trained_until_weights_are_trained_without_them(name, tmp_path):
    supernet = calibrated(name, schemes=["W8A8_STATIC_ASYM"])
    before = constants_of(supernet)
    jointopt.train_supernet(supernet, labelled(name), 4, recipe=RECIPE, learning_rate=3e-3)
    learned = constants_of(supernet)
    supernet.calibrate(batches(name))
    assert equal(constants_of(supernet), learned) and not equal(learned, before)
    supernet.save(tmp_path / "supernet.safetensors")
    again = calibrated(name, schemes=["W8A8_STATIC_ASYM"])
    again.load(tmp_path / "supernet.safetensors")
    again.calibrate(batches(name))
    assert equal(constants_of(again), learned) and again.fingerprint() == supernet.fingerprint()
    jointopt.train_supernet(supernet, labelled(name), 1, learning_rate=3e-3)
    supernet.calibrate(batches(name))
    fresh = calibrated(name, schemes=["W8A8_STATIC_ASYM"])
    fresh.model.load_state_dict(supernet.model.state_dict())
    fresh.weights_changed()
    fresh.calibrate(batches(name))
    assert equal(constants_of(supernet), constants_of(fresh)) and not equal(constants_of(supernet), learned)


def test_a_trained_range_of_inputs_mends_one_that_outliers_spoilt():
    items = digits()
    model = digits_vit_with_outliers(items)
    space = SearchSpace.for_model(model, schemes=["W8A8_STATIC"], preset="fixed")
    supernet = Supernet(model, space)
    inputs = [{"pixel_values": batch["pixel_values"]} for batch in items]
    supernet.calibrate(inputs[:2])
    for constants in supernet._measured_constants.values():
        constants["input_scale"] *= 16

    distance = distance_from(model, inputs)
    options = {"steps": 60, "learning_rate": 1e-3}
    fixed, learned = (
        distance(jointopt.finish(supernet, space.largest, inputs, learned_ranges=each, **options).model)
        for each in (False, True)
    )
    assert learned < 0.5 * fixed, (learned, fixed)
