"""Reconstruction: codes of a block move towards the block's outputs, and only as far as that holds elsewhere."""

from __future__ import annotations

import torch
from torch import nn

from jointopt.finishing.lockstep import Arrived, Call
from jointopt.finishing.reconstruction import reconstruct
from jointopt.finishing.rounding import _rounded
from jointopt.supernet.subnetwork import quantize_layer
from jointopt.supernet.weight_bank import BankedWeight
from quant.formats import scheme
from quant.kernels import quantize
from quant.rounding.compensated import gptq
from quant.rounding.moments import InputMoments


class Block(nn.Module):
    """Two layers and what is between them, as transformers' blocks are called."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, scale=1.0, as_tuple=False):
        out = x + self.down(nn.functional.gelu(self.up(x))) * scale
        return (out, None) if as_tuple else out


NAMES = ("up", "down")


def pair(seed: int = 0) -> tuple[Block, Block]:
    """A block in 4 bits, rounded to nearest, and its unquantized self."""
    torch.manual_seed(seed)
    original, block = Block(), Block()
    block.load_state_dict(original.state_dict())
    wanted = scheme("W4A8_G32")
    for name in NAMES:
        layer = block.get_submodule(name)
        rounded = quantize(layer.weight, wanted.weights)
        quantize_layer(layer, wanted, BankedWeight(rounded, rounded.dequantize()), None, None, {})
    return block, original


def weights(original: Block) -> dict[str, torch.Tensor]:
    return {name: original.get_submodule(name).weight.detach() for name in NAMES}


def arrivals(count: int, seed: int, mask=None, **kwargs) -> list[Arrived]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) / 4
    calls = [Call((torch.randn(4, 16, 32, generator=generator) @ mixing,), kwargs) for _ in range(count)]
    return [Arrived(call, call, mask) for call in calls]


def distance(block: Block, original: Block, given: list[Arrived]) -> float:
    with torch.no_grad():
        return sum(float((block(*g.call.args) - original(*g.call.args)).square().mean()) for g in given)


def test_outputs_come_nearer_on_inputs_that_were_not_seen():
    block, original = pair()
    unseen = arrivals(4, seed=1)
    before = distance(block, original, unseen)
    assert reconstruct(block, weights(original), arrivals(8, seed=0), original) > 0
    assert distance(block, original, unseen) < 0.9 * before


def test_scales_and_biases_stay_and_weights_are_what_the_codes_stand_for():
    block, original = pair()
    before = {name: (block.get_submodule(name).quantized, block.get_submodule(name).bias.clone()) for name in NAMES}
    reconstruct(block, weights(original), arrivals(8, seed=0), original)
    for name, (quantized, bias) in before.items():
        layer = block.get_submodule(name)
        assert layer.quantized.scale is quantized.scale
        assert not torch.equal(layer.quantized.codes, quantized.codes)
        assert torch.equal(layer.bias, bias)
        assert torch.equal(layer.weight, layer.quantized.dequantize())
        assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad


def test_what_does_not_hold_for_the_batches_left_out_is_not_kept():
    block, original = pair()
    judging = arrivals(1, seed=1)
    before = distance(block, original, judging)
    reconstruct(block, weights(original), [*arrivals(3, seed=0, scale=-5.0), *judging], original)
    assert distance(block, original, judging) <= before


def test_a_single_batch_judges_itself():
    block, original = pair()
    given = arrivals(1, seed=0)
    before = distance(block, original, given)
    assert reconstruct(block, weights(original), given, original) > 0
    assert distance(block, original, given) < before


def test_padding_does_not_count():
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[:, 10:] = 0
    found = []
    for padding in (0.0, 100.0):
        block, original = pair()
        given = arrivals(4, seed=0, mask=mask)
        for each in given:
            each.call.args[0][:, 10:] = padding
        reconstruct(block, weights(original), given, original)
        found.append(block.up.quantized.codes)
    assert torch.equal(*found)


class Product(Block):
    """What multiplies tokens, so that it is as large as they are."""

    def forward(self, x):
        return self.down(self.up(x))


def test_a_token_counts_the_same_however_large_it_is():
    found = []
    for size in (1.0, 1024.0):
        block, original = pair()
        for each in (block, original):
            each.__class__ = Product
            each.up.bias, each.down.bias = None, None
        given = arrivals(4, seed=0)
        for each in given:
            each.call.args[0][:, ::3] *= size
        reconstruct(block, weights(original), given, original)
        found.append(block.up.quantized.codes)
    assert torch.equal(*found)


def test_a_block_may_take_keywords_and_give_a_tuple():
    block, original = pair()
    assert reconstruct(block, weights(original), arrivals(4, seed=0, scale=0.5, as_tuple=True), original) > 0


def test_it_gives_the_same_again():
    found = []
    for _ in range(2):
        block, original = pair()
        reconstruct(block, weights(original), arrivals(4, seed=0), original)
        found.append(block.down.quantized.codes)
    assert torch.equal(*found)


def test_ranges_are_chosen_by_the_energy_of_the_inputs_that_meet_each_weight():
    layer, x = nn.Conv2d(4, 6, 1, groups=2, bias=False), torch.randn(8, 4, 5, 5)
    x *= torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None]
    halves = InputMoments(layer), InputMoments(layer)
    for half, part in zip(halves, x.chunk(2), strict=True):
        half.add(part)
    seen = []
    _rounded(layer, layer.weight.detach(), scheme("W8A16_CHANNEL"), halves, lambda _, each: seen.append(each), gptq)
    energy = x.square().mean((0, 2, 3)).reshape(2, 2)
    torch.testing.assert_close(seen[0], energy.repeat_interleave(3, 0), rtol=1e-4, atol=1e-4)
