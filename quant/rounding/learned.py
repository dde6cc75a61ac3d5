"""Learned rounding: each code as a position among a format's values, which gradients move through its rounding.

AdaRound (Nagel et al., arXiv 2004.10568) learns which neighbour each weight is rounded to; passed straight through, a
position may also go further (Cheng et al., arXiv 2309.05516). Positions move in units of the distance between the
values where they are, which for floating point depends on the exponent (Chen et al., arXiv 2408.06995).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.formats import Element
from quant.reference import round_to_format, straight_through
from quant.rounding.compensated import spread_grid
from quant.tensors import QuantizedTensor, code_values, value_codes

_INSIDE = 0.98
"""How far towards the borders with its neighbours a position may begin, as a share of the way: at the border itself a
rounding error would decide."""


@dataclass(frozen=True)
class CodePositions:
    """Where the elements of a quantized tensor begin, between the values that their format can hold.

    Attributes:
        start: float32 [rows, columns], in the format's own units: each rounds to the element's code.
        spacing: distance to the neighbouring values there, the mean of both sides.
        step, zero: what a unit is worth, and the zero point, of each element.
    """

    quantized: QuantizedTensor
    start: Tensor
    spacing: Tensor
    step: Tensor
    zero: Tensor

    def held(self, moves: Tensor) -> Tensor:
        """The values of the tensor whose elements were moved by so many spacings, float32 in its shape, through which
        gradients reach the moves."""
        position = self.start + moves * self.spacing
        units = straight_through(position, self._rounded(position.detach()))
        return ((units - self.zero) * self.step).reshape(self.quantized.shape)

    def moved(self, moves: Tensor) -> QuantizedTensor:
        """The codes that `held` stands for, with the scales as they are."""
        units = self._rounded(self.start + moves.detach() * self.spacing)
        return replace(self.quantized, codes=value_codes(units, self.quantized.format.kind))

    def _rounded(self, position: Tensor) -> Tensor:
        return round_to_format(position, self.quantized.format.element)


@torch.no_grad()
def positions(quantized: QuantizedTensor, target: Tensor) -> CodePositions:
    """The positions of a tensor's elements: as near to `target` as their codes allow.

    Args:
        target: the weight that was rounded. Where it was rounded to nearest, positions are the weight itself; where its
            errors were made good by other columns (GPTQ), those beyond a border begin just inside.
    """
    step, zero = spread_grid(quantized)
    kind = quantized.format.kind
    values = _values(kind, target.device)
    index = torch.searchsorted(values, code_values(quantized.codes, kind))
    units = values[index]
    below, above = values[(index - 1).clamp(min=0)], values[(index + 1).clamp(max=len(values) - 1)]
    below = torch.where(index == 0, 2 * units - above, below)
    above = torch.where(index == len(values) - 1, 2 * units - below, above)
    wanted = target.detach().float().flatten(1) / step + zero
    inside = (units + _INSIDE / 2 * (side - units) for side in (below, above))
    return CodePositions(quantized, wanted.clamp(*inside), (above - below) / 2, step, zero)


def _values(kind: Element, device: torch.device) -> Tensor:
    """All that an element can be, ascending."""
    if not kind.is_float:
        return torch.arange(kind.min, kind.max + 1, dtype=torch.float32, device=device)
    if kind.values is not None:
        return torch.tensor(kind.values, dtype=torch.float32, device=device).unique()
    codes = torch.arange(2**kind.bits, device=device).to(torch.uint8)
    values = code_values(codes, kind)
    return values[values.abs() <= kind.max].unique()
