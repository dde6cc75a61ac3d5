"""Laws of making good what a layer's inputs lost: better on data not seen, or left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quant.rounding.moments import InputMoments, joined
from quant.rounding.recovery import recovered


def halves_of(layer: nn.Module, inputs: Tensor, originals: Tensor) -> tuple[InputMoments, InputMoments]:
    halves = InputMoments(layer), InputMoments(layer)
    for half, x, original in zip(halves, inputs.chunk(2), originals.chunk(2), strict=True):
        half.add(x, original)
    return halves


def mixed_inputs(samples: int, columns: int = 12) -> tuple[Tensor, Tensor]:
    """The original's inputs, and what comes in their place: scaled, mixed, with noise."""
    originals = torch.randn(samples, columns) @ torch.randn(
        columns, columns, generator=torch.Generator().manual_seed(1)
    )
    mixing = 0.9 * torch.eye(columns) + 0.05 * torch.randn(columns, columns, generator=torch.Generator().manual_seed(2))
    return originals @ mixing + 0.05 * torch.randn(samples, columns), originals


def outputs_lost(layer: nn.Module, weight: Tensor, inputs: Tensor, originals: Tensor) -> float:
    return float((nn.functional.linear(originals, layer.get_parameter("weight")) - inputs @ weight.T).square().mean())


def test_on_inputs_not_seen_outputs_are_nearer_to_the_originals():
    torch.manual_seed(0)
    layer = nn.Linear(12, 5, bias=False)
    weight = layer.weight.detach()
    found = recovered(weight, halves_of(layer, *mixed_inputs(2000)))
    unseen = mixed_inputs(2000)
    assert outputs_lost(layer, found, *unseen) < 0.2 * outputs_lost(layer, weight, *unseen)


def test_noise_of_few_inputs_is_not_learned():
    torch.manual_seed(0)
    layer = nn.Linear(64, 16, bias=False)
    weight = layer.weight.detach()
    originals = torch.randn(160, 64)
    inputs = originals + 0.1 * torch.randn(160, 64)
    found = recovered(weight, halves_of(layer, inputs, originals))
    originals = torch.randn(4000, 64)
    unseen = originals + 0.1 * torch.randn(4000, 64), originals
    assert outputs_lost(layer, found, *unseen) < 1.05 * outputs_lost(layer, weight, *unseen)


@pytest.mark.parametrize("centred", [False, True])
def test_inputs_that_lost_nothing_leave_the_weight(centred):
    layer = nn.Linear(12, 5)
    _, originals = mixed_inputs(100)
    assert torch.equal(recovered(layer.weight, halves_of(layer, originals, originals), centred), layer.weight)


def test_half_without_inputs_leaves_the_weight():
    layer = nn.Linear(12, 5)
    halves = InputMoments(layer), InputMoments(layer)
    halves[0].add(*mixed_inputs(100))
    assert torch.equal(recovered(layer.weight, halves), layer.weight)


def test_convolutions_in_groups_recover_too():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, groups=2, bias=False)
    originals = torch.randn(40, 4, 8, 8)
    halves = halves_of(layer, 0.8 * originals, originals)
    found = recovered(layer.weight, halves)
    torch.testing.assert_close(found, layer.weight.detach() / 0.8, rtol=0.02, atol=1e-3)


def test_halves_join_to_the_moments_of_all():
    layer = nn.Linear(12, 5)
    inputs, originals = mixed_inputs(100)
    whole = InputMoments(layer)
    whole.add(inputs, originals)
    both = joined(halves_of(layer, inputs, originals))
    torch.testing.assert_close(both.hessian(centred=True), whole.hessian(centred=True), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both.original_mean(), originals.mean(0, keepdim=True), rtol=1e-3, atol=1e-4)
