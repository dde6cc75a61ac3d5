"""Rotations and scalings of a super-network: its function stays, in every sub-network, and its outliers go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.transforms import TRANSFORMS, rotate_heads, rotate_stream, scale_link
from quant.formats import SCHEMES
from quant.reference import fake_quantize
from quant.rotations import hadamard, mean_keeping_rotation, rotation
from quant.smoothing import awq_scale, smooth_scale
from tests.zoo import MODELS, RELATIVES, batches, logits, make

ALLOWED = {
    **dict.fromkeys(("llama_tied", "llama_untied", "mistral", "qwen2", "qwen3", "vit", "deit", "timm_vit"), TRANSFORMS),
    **dict.fromkeys(("bert", "roberta"), ("rotate_heads", "smooth", "awq")),
    **dict.fromkeys(("resnet", "resnet_basic", "timm_resnet", "timm_resnet_basic"), ("smooth", "awq")),
}
CASES = [(name, each) for name, allowed in ALLOWED.items() for each in allowed if each != "awq"]


@given(st.sampled_from([1, 2, 4, 12, 20, 28, 36, 60, 64, 80, 96, 128, 144, 192, 384, 576]))
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(order):
    matrix = hadamard(order)
    assert matrix is not None and torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@given(st.integers(1, 100), st.integers(0, 3))
def test_rotations_of_every_order_are_orthogonal_and_one_of_them_keeps_the_mean(order, seed):
    unit = torch.eye(order, dtype=torch.float64)
    for make_one in (rotation, mean_keeping_rotation):
        turn = make_one(order, seed)
        torch.testing.assert_close(turn @ turn.T, unit)
    torch.testing.assert_close(turn.sum(1), unit.sum(1))


def test_what_one_channel_holds_is_spread_over_all():
    outlier = torch.zeros(576, dtype=torch.float64)
    outlier[3] = 100
    assert (outlier @ rotation(576)).abs().max() <= 100 / 576**0.5 + 1e-9
    assert (outlier @ mean_keeping_rotation(576)).abs().max() < 25


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=8))
def test_smoothing_makes_activations_and_weights_equally_large_and_is_done_once(ranges):
    inputs, weights = torch.tensor(ranges).T
    scale = smooth_scale(inputs, weights)
    torch.testing.assert_close(inputs / scale, weights * scale)
    torch.testing.assert_close(smooth_scale(inputs / scale, weights * scale), torch.ones_like(scale))


def test_channels_that_are_never_used_or_read_are_not_scaled():
    assert torch.equal(smooth_scale(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])), torch.ones(2))


def test_awq_loses_less_than_rounding_as_it_is():
    torch.manual_seed(0)
    weight, form = torch.randn(32, 64), SCHEMES["W4A16"].fitted([64]).weights
    inputs = torch.randn(100, 64) * torch.logspace(-1, 1.5, 64)
    scale = awq_scale(inputs.abs().mean(0), torch.arange(64), [(weight, inputs, form)])

    def error(held: torch.Tensor) -> float:
        return float((inputs @ (held - weight).T).square().sum())

    assert error(fake_quantize(weight * scale, form) / scale) < 0.7 * error(fake_quantize(weight, form))


def model_of(name: str) -> nn.Module:
    """With normalizations and biases that are not ones and zeros, so that a fold that forgets one is seen."""
    model = make(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for key in ("weight", "bias"):
                tensor = getattr(module, key, None)
                if tensor is not None and tensor.dim() == 1:
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def changed(supernet: Supernet, name: str, transform: str) -> None:
    """The transform made on a super-network that is sorted already, so that its sub-networks are the same."""
    if transform == "rotate":
        rotate_stream(supernet.model, supernet.family)
    elif transform == "rotate_heads":
        rotate_heads(supernet.model, supernet.family)
    else:
        generator = torch.Generator().manual_seed(2)
        for link in supernet.family.links:
            channels = supernet.model.get_submodule(link.producer).weight.shape[0]
            scale_link(supernet.model, link, torch.rand(channels, generator=generator) * 3 + 0.2)


@pytest.mark.parametrize(("name", "transform"), CASES)
def test_the_function_of_every_sub_network_is_preserved(name, transform):
    model = model_of(name)
    space = SearchSpace.for_model(model, schemes=["none"])
    supernet = Supernet(model, space)
    if transform == "rotate" and supernet.family.stream.untie:
        supernet = Supernet(model, space, transforms=["rotate"])  # untied, and rotated a second time below
    supernet.calibrate(batches(name))
    genomes = [space.largest, space.smallest, *space.sample(4, seed=0)]
    batch = batches(name, seed=1)[0]
    before = [logits(supernet.extract(genome), batch) for genome in genomes]
    changed(supernet, name, transform)
    for genome, expected in zip(genomes, before, strict=True):
        found = logits(supernet.extract(genome), batch)
        torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("name", [*MODELS, *RELATIVES])
def test_the_whole_model_computes_what_the_original_does_under_all_that_its_family_allows(name):
    allowed = [each for each in ALLOWED[name] if each != "awq"]
    model = model_of(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]), transforms=allowed)
    supernet.calibrate(batches(name))
    batch = batches(name, seed=1)[0]
    expected = logits(model, batch)
    with supernet.active(supernet.space.largest) as whole:
        torch.testing.assert_close(logits(whole, batch), expected, atol=5e-4 * float(expected.abs().max()), rtol=1e-3)
