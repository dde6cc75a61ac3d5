"""The moments that rounding sees: the same however samples come in batches; of all tokens, not a massive few."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jointopt.finishing.lockstep import Arrived, Call
from jointopt.finishing.shared_moments import SharedMoments
from quant.formats import scheme
from quant.rounding.compensated import gptq
from quant.rounding.moments import Halves, InputMoments, joined

SCHEME = scheme("W4A16_G64")


def moments(layer: nn.Module, x: Tensor, original: Tensor, mask: Tensor, size: int) -> Halves:
    parts = zip(x.split(size), original.split(size), mask.split(size), strict=True)
    arrived = [Arrived(Call((a,), {}), Call((b,), {}), each) for a, b, each in parts]
    return SharedMoments().of(layer, SCHEME, {}, arrived)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_however_samples_are_cut_into_batches_moments_are_the_same_to_the_bit():
    layer, mask = nn.Linear(64, 8), random(12, 5, seed=0) < 0.7
    x, original = random(12, 5, 64, seed=1), random(12, 5, 64, seed=2)
    for one, other in zip(*(moments(layer, x, original, mask, size) for size in (12, 5)), strict=True):
        assert torch.equal(one.gram, other.gram)
        assert torch.equal(one.lost, other.lost)
        assert one.count == other.count > 0


def test_tokens_of_usual_length_count_once_and_padding_never():
    layer, mask = nn.Linear(64, 8), random(12, 5, seed=0) < 0.7
    x = random(12, 5, 64, seed=1)
    x[~mask] = 1e4
    halves = moments(layer, x, x, mask, 12)
    assert [half.count for half in halves] == [int(mask[0::2].sum()), int(mask[1::2].sum())]
    torch.testing.assert_close(halves[0].gram[0], x[0::2][mask[0::2]].T @ x[0::2][mask[0::2]], rtol=1e-5, atol=1e-4)


def test_a_massive_token_leaves_the_others_their_say():
    layer = nn.Linear(64, 16, bias=False)
    weight = random(16, 64, seed=0)
    layer.weight.data.copy_(weight)
    x = random(8, 20, 16, seed=1) @ random(16, 64, seed=2)
    massive = x.clone()
    massive[0, 0] *= 3000
    whole = InputMoments(layer)
    whole.add(massive)

    def lost(hessian: Tensor) -> float:
        held = gptq(weight, hessian, SCHEME.weights).dequantize()
        return float((x.flatten(0, 1)[1:] @ (held - weight).T).square().mean())

    without, beside_it = (
        lost(joined(moments(layer, each, each, torch.ones(8, 20), 8)).hessian()) for each in (x, massive)
    )
    assert beside_it < 1.5 * without
    assert lost(whole.hessian()) > 2 * without


def test_where_most_inputs_are_zero_the_others_still_count():
    layer, mask = nn.Linear(64, 8), torch.ones(4, 5)
    x = random(4, 5, 64, seed=0)
    x[:, 1:] = 0
    halves = moments(layer, x, x, mask, 4)
    assert sum(half.count for half in halves) == 20
    torch.testing.assert_close(joined(halves).gram[0], x.flatten(0, 1).T @ x.flatten(0, 1))
