"""Least-squares repair of narrowed layers: the arithmetic, and what it does to whole sub-networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jointopt import SearchSpace, Supernet
from jointopt.supernet import repair
from jointopt.supernet.repair import Repairs, repaired
from quant.rounding.moments import InputMoments
from tests.test_quant_gptq import moments_of
from tests.test_three_are_one import three_are_one
from tests.zoo import batches, logits, make


def all_in_one(layer: nn.Module, x: torch.Tensor) -> tuple[InputMoments, InputMoments]:
    """Moments with nothing beside them to try a fit on."""
    return moments_of(layer, x), InputMoments(layer)


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mix + torch.randn(columns, generator=generator)


@given(st.integers(0, 2**31 - 1), st.integers(1, 11), st.booleans())
def test_a_repaired_layer_is_never_further_from_the_whole_one_than_its_slice(seed, channels, biased):
    torch.manual_seed(seed % 1000)
    layer, x = nn.Linear(12, 5, bias=biased), correlated(200, 12, seed)
    weight, bias = repaired(layer, (moments_of(layer, x[:100]), moments_of(layer, x[100:])), channels)
    with torch.no_grad():
        error = (nn.functional.linear(x[:, :channels], weight, bias) - layer(x)).square().sum()
        plain = (
            (nn.functional.linear(x[:, :channels], layer.weight[:, :channels], layer.bias) - layer(x)).square().sum()
        )
    assert error <= plain * 1.0001


def test_without_damping_it_is_the_least_squares_fit(monkeypatch):
    monkeypatch.setattr(repair, "DAMPINGS", (1e-9,))
    layer, x = nn.Linear(12, 5), correlated(300, 12, 0).double().float()
    weight, bias = repaired(layer, all_in_one(layer, x), 7)
    design = torch.cat([x[:, :7], torch.ones(300, 1)], dim=1).double()
    fit = torch.linalg.lstsq(design, layer(x).detach().double()).solution.T
    torch.testing.assert_close(weight, fit[:, :7].float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bias, fit[:, 7].float(), rtol=1e-3, atol=1e-3)


def test_channels_that_repeat_others_can_leave_at_no_loss(monkeypatch):
    monkeypatch.setattr(repair, "DAMPINGS", (1e-7,))
    layer, half = nn.Linear(8, 3), correlated(100, 4, 0)
    x = torch.cat([half, half], dim=1)
    weight, bias = repaired(layer, all_in_one(layer, x), 4)
    torch.testing.assert_close(nn.functional.linear(half, weight, bias), layer(x), rtol=1e-3, atol=1e-3)


def test_inputs_that_were_always_zero_leave_the_slice_as_it_is():
    layer = nn.Linear(8, 3, bias=False)
    weight, bias = repaired(layer, all_in_one(layer, torch.zeros(10, 8)), 5)
    assert torch.equal(weight, layer.weight[:, :5])
    assert bias is None


def test_of_what_few_inputs_say_only_that_is_taken_which_holds_for_others():
    """Channels that leave have nothing to do with those that stay: from 60 inputs it looks otherwise."""
    torch.manual_seed(0)
    layer, x, unseen = nn.Linear(64, 16, bias=False), torch.randn(60, 64), torch.randn(2000, 64)

    def error(halves: tuple[InputMoments, InputMoments]) -> float:
        weight, _ = repaired(layer, halves, 48)
        return float((unseen[:, :48] @ weight.T - layer(unseen)).square().mean().detach())

    plain = float((unseen[:, :48] @ layer.weight[:, :48].T - layer(unseen)).square().mean().detach())
    tried = error((moments_of(layer, x[:30]), moments_of(layer, x[30:])))
    assert tried < 1.05 * plain
    assert error(all_in_one(layer, x)) > 2 * plain


@pytest.mark.parametrize("size", [1, 2, 5])
def test_halves_have_other_samples_and_all_of_them(size):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]), repair=True)
    repairs = Repairs(supernet.model, supernet.family, supernet.space)
    path, listen = repairs.listeners()[0]
    layer = supernet.model.get_submodule(path)
    x = torch.randn(10, layer.in_features)
    for batch in x.split(size):
        listen(batch)
    first, second = repairs._moments[path]
    assert (first.count, second.count) == (5, 5)
    torch.testing.assert_close(first.gram + second.gram, (x.T @ x)[None])


def test_a_convolution_is_repaired_over_its_patches():
    layer = nn.Conv2d(6, 4, 3, padding=1)
    x = correlated(4 * 25, 6, 0).reshape(4, 5, 5, 6).permute(0, 3, 1, 2)
    weight, bias = repaired(layer, (moments_of(layer, x[:2]), moments_of(layer, x[2:])), 4)
    assert weight.shape == (4, 4, 3, 3)
    whole = layer(x)
    plain = nn.functional.conv2d(x[:, :4], layer.weight[:, :4], layer.bias, padding=1)
    fitted = nn.functional.conv2d(x[:, :4], weight, bias, padding=1)
    assert (fitted - whole).norm() < 0.7 * (plain - whole).norm()


def narrowed(name: str, repair: bool) -> tuple[Supernet, list[float]]:
    """A super-network, and how far ten unquantized sub-networks are from the whole model on unseen inputs."""
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W4A16"]), repair=repair)
    supernet.calibrate(batches(name, count=8, size=16))
    batch = batches(name, seed=1, size=32)[0]
    errors = []
    for genome in supernet.space.sample(10, seed=0):
        genome = np.where(
            [n.endswith((".precision", "depth")) for n in supernet.space.names], supernet.space.largest, genome
        )
        errors.append(float((logits(supernet.extract(genome), batch) - logits(model, batch)).norm()))
    return supernet, errors


@pytest.mark.parametrize("name", ["vit", "timm_vit", "bert", "llama_tied", "llama_untied", "resnet"])
def test_repaired_sub_networks_are_nearer_to_the_whole_model(name):
    _, plain = narrowed(name, repair=False)
    _, fitted = narrowed(name, repair=True)
    assert np.median(np.divide(fitted, plain)) < 1


@pytest.mark.parametrize("name", ["vit", "bert", "llama_tied", "resnet"])
def test_the_whole_model_is_left_as_it_is(name):
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]), repair=True)
    supernet.calibrate(batches(name))
    batch = batches(name, seed=1)[0]
    torch.testing.assert_close(
        logits(supernet.extract(supernet.space.largest), batch), logits(model, batch), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["bert", "llama_tied", "timm_resnet"])
def test_view_extracted_and_reloaded_are_one_when_repaired(name, tmp_path):
    three_are_one(name, 3, tmp_path, repair=True)


def test_repairs_are_part_of_the_fingerprint():
    one, other = (narrowed("vit", repair)[0] for repair in (True, False))
    assert one.fingerprint() != other.fingerprint()
