"""Least-squares repair: what stays of a narrowed layer's inputs makes up for what leaves, without any training.

A layer that reads a narrowed width computes W_S x_S instead of W x. Of all weights on the channels that stay, these
come closest on the calibration data: the optimal-brain-surgeon update for a whole structure (ZipLM, arXiv 2302.04089,
equation 3; SparseGPT, arXiv 2301.00774). Once a layer and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from jointopt.supernet.importance import Listener, channel_order
from quant.errors import JointoptError
from quant.rounding.moments import Halves, InputMoments, joined
from quant.rounding.recovery import tried
from search_spaces.family import Family, Part, Width
from search_spaces.space import SearchSpace

DAMPINGS = (0.01, 0.1)
"""Of the mean diagonal of the kept inputs' second moments, as in GPTQ: the pull back to the unrepaired weight. One of
them is chosen."""

Repaired = tuple[Tensor, Tensor | None]
"""Weight [rows, channels that stay, ...] and bias [rows]."""


@torch.no_grad()
def repaired(layer: nn.Module, halves: Halves, channels: int) -> Repaired:
    """A layer's weight and bias for its first `channels` input channels: min over D of E|W x - (W_S + D) x_S|^2 +
    damping |D|^2, where a bias takes up the mean of the error.

    Few inputs tell little of D, so what is fitted to each half of the data is tried on the other: that says the
    damping, and what share of D holds (SmolLM2-135M, MLPs of 3/4, from 8,192 tokens that it was trained on: KL of
    other text 0.496 without D, 0.512 with all of it at the least damping).

    Args:
        halves: the moments of all its inputs, of two parts of the data, in the order of the weight's columns. Where
            one has none, all of D is taken, with the first damping.

    Raises:
        JointoptError: there were no inputs, or some that are not finite.
    """
    weight = layer.get_parameter("weight").detach()
    bias = layer._parameters.get("bias")
    kept = channels * weight[0, 0].numel()

    def hessian(moments: InputMoments) -> Tensor:
        return moments.hessian(centred=bias is not None)[0].to(weight.device).double()

    both, parts = joined(halves), [hessian(half) for half in halves if half.count]
    whole = weight.flatten(1).double()
    stay, leave = whole[:, :kept], whole[:, kept:]
    damping, share = _that_holds(parts, leave) if len(parts) > 1 else (DAMPINGS[0], 1.0)
    change = share * _least_squares(hessian(both), leave, damping)
    shape = (len(weight), channels, *weight.shape[2:])
    repaired_weight = (stay + change).reshape(shape).to(weight)
    if bias is None:
        return repaired_weight, None
    mean = both.mean()[0].to(weight.device).double()
    shift = leave @ mean[kept:] - change @ mean[:kept]
    return repaired_weight, (bias.detach().double() + shift).to(bias)


def _least_squares(hessian: Tensor, leave: Tensor, damping: float) -> Tensor:
    """D, of the rows' weights on the channels that leave, the last."""
    kept = len(hessian) - leave.shape[1]
    pull = damping * hessian[:kept, :kept].diagonal().mean()
    if not pull > 0:
        return leave.new_zeros(len(leave), kept)
    damped = hessian[:kept, :kept] + pull * torch.eye(kept, dtype=torch.float64, device=hessian.device)
    return torch.cholesky_solve(hessian[:kept, kept:] @ leave.mT, torch.linalg.cholesky(damped)).mT


def _that_holds(halves: Sequence[Tensor], leave: Tensor) -> tuple[float, float]:
    """The damping, and the share from 0 to 1 of D, with which fits to each half lose least on the other."""
    kept = len(halves[0]) - leave.shape[1]
    wanted, hessians = [leave @ half[kept:, :kept] for half in halves], [half[:kept, :kept] for half in halves]
    most, best = -1.0, (DAMPINGS[0], 0.0)
    for damping in DAMPINGS:
        share, gain = tried([_least_squares(half, leave, damping) for half in halves], wanted, hessians)
        if gain > most:
            most, best = gain, (damping, share)
    return best


class Repairs:
    """What calibration measures for repairs, and then the repaired layers: (path, channels that stay) -> `Repaired`.

    Without a space nothing is repaired. Convolutions in groups are left as they are: what leaves of one group says
    nothing of another.
    """

    def __init__(self, model: nn.Module, family: Family, space: SearchSpace | None):
        self._model = model
        choices = {gene.name: gene.choices for gene in space.genes} if space else {}
        self._parts: list[tuple[Width, Part, tuple[int, ...]]] = [
            (width, part, choices[width.gene])
            for width in family.widths
            for part in width.consumers
            if width.gene in choices and getattr(model.get_submodule(part.module), "groups", 1) == 1
        ]
        layers = {part.module: model.get_submodule(part.module) for _, part, _ in self._parts}
        self._moments = {path: (InputMoments(layer), InputMoments(layer)) for path, layer in layers.items()}

    def listeners(self) -> list[Listener]:
        return [(path, partial(_add, halves)) for path, halves in self._moments.items()]

    def reorder(self, width: Width, order: Tensor) -> None:
        """A width's units were sorted: its consumers' inputs come in another order."""
        for part in width.consumers:
            if part.module in self._moments:
                area = self._model.get_submodule(part.module).get_parameter("weight")[0, 0].numel()
                for half in self._moments[part.module]:
                    half.reorder(channel_order(order, part.channels * area))

    def solved(self) -> Mapping[tuple[str, int], Repaired]:
        """All repairs; the moments are let go."""
        found = {}
        for width, part, sizes in self._parts:
            layer, halves = self._model.get_submodule(part.module), self._moments.pop(part.module)
            for channels in _narrowed(width, part, sizes):
                try:
                    found[part.module, channels] = repaired(layer, halves, channels)
                except (JointoptError, torch.linalg.LinAlgError) as error:
                    raise JointoptError(f"repair: {part.module}: {error}") from None
        return found


def _add(halves: Halves, x: Tensor) -> None:
    """The front of each batch to one, the rest to the other; more to that which has less."""
    first, second = halves if halves[0].count <= halves[1].count else halves[::-1]
    cut = (len(x) + 1) // 2
    first.add(x[:cut])
    second.add(x[cut:])


def _narrowed(width: Width, part: Part, sizes: Iterable[int]) -> list[int]:
    units = (int(size) // width.unit for size in sizes)
    return [count * part.channels for count in units if count < width.units]
