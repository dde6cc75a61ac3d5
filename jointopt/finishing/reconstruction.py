"""Rounding of a block learned towards the block's outputs, from codes that were found layer by layer.

What layers lose together is seen only where their block ends: an error of one can be made good by the next, through
attention, nonlinearities and roundings of inputs, of which a layer's own Hessian knows nothing (block reconstruction,
BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.finishing.lockstep import Arrived, Call
from jointopt.outputs import first_output
from quant.rounding.learned import positions

STEPS = 200
RATE = 0.015
"""Adam's, in spacings between a format's values, going to 0 in a straight line: enough to move by 1.5 of them."""
HELD_OUT = 8
"""One batch of so many only judges, of fewer the last."""
_JUDGED = 20
_LEAST = 1e-6
"""Mean square of a token that is not counted as smaller."""


def reconstruct(
    block: nn.Module, weights: Mapping[str, Tensor], arrived: Sequence[Arrived], original: nn.Module
) -> int:
    """Moves codes of a block's layers so that its outputs come nearer to those that the original has there.

    Each step takes one batch, in their order. Every eighth batch (of fewer the last) is left out, and every 20 steps
    says how far the outputs are there; what was best stays. So codes stay as they were where what is learned does not
    hold for inputs not seen, as where weights alone are rounded and few samples tell how. A single batch judges
    itself. Positions of padding do not count. Scales, biases and whatever is not quantized stay.

    Args:
        block: its quantized layers are changed in place.
        weights: name in the block of each layer whose codes may move -> the weight that was rounded to them.
        arrived: what goes into it, and into the original's block.

    Returns:
        After which step it was best; 0 where codes stay.
    """
    if not weights:
        return 0
    with torch.no_grad():
        targets = [_output(original, each.original) for each in arrived]
    everything = range(len(arrived))
    judging = everything[HELD_OUT - 1 :: HELD_OUT] or everything[-1:]
    learning = [at for at in everything if at not in judging] or judging
    codes = _Codes(block, weights)

    def distance(at: int) -> Tensor:
        return _distance(_output(block, arrived[at].call), targets[at], arrived[at].mask)

    def judged() -> float:
        with torch.no_grad():
            codes.place()
            return float(sum(distance(at) for at in judging))

    optimizer = torch.optim.Adam(codes.moves, lr=RATE)
    least, best, kept = judged(), 0, [move.detach().clone() for move in codes.moves]
    for step, at in zip(range(STEPS), itertools.cycle(learning), strict=False):
        with torch.enable_grad():
            codes.place()
            gradients = torch.autograd.grad(distance(at), codes.moves, materialize_grads=True)
        for move, gradient in zip(codes.moves, gradients, strict=True):
            move.grad = gradient
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
        if (step + 1) % _JUDGED == 0 and (now := judged()) < least:
            least, best, kept = now, step + 1, [move.detach().clone() for move in codes.moves]
    codes.settle(kept)
    return best


class _Codes:
    """The codes of a block's layers, while they are learned.

    Attributes:
        moves: of each layer, by how many spacings its elements were moved, float32 [rows, columns].
    """

    def __init__(self, block: nn.Module, weights: Mapping[str, Tensor]):
        self._layers: list[Any] = [block.get_submodule(name) for name in weights]
        self._dtypes = [weight.dtype for weight in weights.values()]
        pairs = zip(self._layers, weights.values(), strict=True)
        self._positions = [positions(layer.quantized, weight) for layer, weight in pairs]
        self.moves = [torch.zeros_like(each.start, requires_grad=True) for each in self._positions]
        for layer in self._layers:
            del layer._parameters["weight"]

    def place(self) -> None:
        """The weights as they are now in the layers, with a way for gradients to the moves."""
        for layer, place, move, dtype in zip(self._layers, self._positions, self.moves, self._dtypes, strict=True):
            layer.__dict__["weight"] = place.held(move).to(dtype)

    def settle(self, moves: Collection[Tensor]) -> None:
        """The codes after these moves, for good."""
        for layer, place, move, dtype in zip(self._layers, self._positions, moves, self._dtypes, strict=True):
            layer.__dict__.pop("weight", None)
            layer.__dict__["quantized"] = place.moved(move)
            values = layer.quantized.dequantize(dtype)
            layer._parameters["weight"] = nn.Parameter(values, requires_grad=False)


def _output(block: nn.Module, call: Call) -> Tensor:
    """The hidden states that a block hands on."""
    return first_output(block(*call.args, **call.kwargs))


def _distance(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over positions of the squared error, of tokens as a share of the target's square there: what reads a token
    divides by its size, and the largest of a language model would leave the others no say."""
    aim = target.float()
    lost = (output.float() - aim).square()
    if lost.dim() == 3:
        lost = lost.mean(-1) / aim.square().mean(-1).clamp(min=_LEAST)
        if mask is not None and mask.shape == lost.shape:
            lost = lost[mask.bool()]
    return lost.mean()
