"""Least-squares repair: what stays of a narrowed layer's inputs makes up for what leaves, without any training.

A layer that reads a narrowed width computes W_S x_S instead of W x. Of all weights on the channels that stay, these
come closest on the calibration data: the optimal-brain-surgeon update for a whole structure (ZipLM, arXiv 2302.04089,
equation 3; SparseGPT, arXiv 2301.00774). Once a layer and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from quant.errors import JointoptError
from quant.rounding.moments import InputMoments
from search_spaces.family import Family, Part, Width
from search_spaces.space import SearchSpace

from .importance import Listener, channel_order

DAMPING = 0.01
"""Of the mean diagonal of the kept inputs' second moments, as in GPTQ: the pull back to the unrepaired weight."""

Repaired = tuple[Tensor, Tensor | None]
"""Weight [rows, channels that stay, ...] and bias [rows]."""


@torch.no_grad()
def repaired(layer: nn.Module, moments: InputMoments, channels: int, damping: float = DAMPING) -> Repaired:
    """A layer's weight and bias for its first `channels` input channels: min over D of E|W x - (W_S + D) x_S|^2 +
    damping |D|^2, where a bias takes up the mean of the error.

    Args:
        moments: of all its inputs, in the order of the weight's columns.

    Raises:
        JointoptError: there were no inputs, or some that are not finite.
    """
    weight = layer.get_parameter("weight").detach()
    place = "cpu" if weight.device.type == "mps" else weight.device  # Apple's GPUs have no float64
    bias = layer._parameters.get("bias")
    kept = channels * weight[0, 0].numel()
    hessian = moments.hessian(centred=bias is not None)[0].to(place).double()
    whole = weight.flatten(1).to(place).double()
    stay, leave = whole[:, :kept], whole[:, kept:]
    pull = damping * hessian[:kept, :kept].diagonal().mean()
    change = torch.zeros_like(stay)
    if pull > 0:
        damped = hessian[:kept, :kept] + pull * torch.eye(kept, dtype=torch.float64, device=hessian.device)
        factor = torch.linalg.cholesky(damped)
        change = torch.cholesky_solve(hessian[:kept, kept:] @ leave.mT, factor).mT
    shape = (len(weight), channels, *weight.shape[2:])
    repaired_weight = (stay + change).reshape(shape).to(weight)
    if bias is None:
        return repaired_weight, None
    mean = moments.mean()[0].to(place).double()
    shift = leave @ mean[kept:] - change @ mean[:kept]
    return repaired_weight, (bias.detach().to(place).double() + shift).to(bias)


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
        self._moments = {part.module: InputMoments(model.get_submodule(part.module)) for _, part, _ in self._parts}

    def listeners(self) -> list[Listener]:
        return [(path, moments.add) for path, moments in self._moments.items()]

    def reorder(self, width: Width, order: Tensor) -> None:
        """A width's units were sorted: its consumers' inputs come in another order."""
        for part in width.consumers:
            if part.module in self._moments:
                area = self._model.get_submodule(part.module).get_parameter("weight")[0, 0].numel()
                self._moments[part.module].reorder(channel_order(order, part.channels * area))

    def solved(self) -> Mapping[tuple[str, int], Repaired]:
        """All repairs; the moments are let go."""
        found = {}
        for width, part, sizes in self._parts:
            layer, moments = self._model.get_submodule(part.module), self._moments.pop(part.module)
            for channels in _narrowed(width, part, sizes):
                try:
                    found[part.module, channels] = repaired(layer, moments, channels)
                except (JointoptError, torch.linalg.LinAlgError) as error:
                    raise JointoptError(f"repair: {part.module}: {error}") from None
        return found


def _narrowed(width: Width, part: Part, sizes: Iterable[int]) -> list[int]:
    units = (int(size) // width.unit for size in sizes)
    return [count * part.channels for count in units if count < width.units]
