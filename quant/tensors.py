"""Quantized tensors: codes, what they stand for, and the codes of values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from quant.errors import JointoptError
from quant.formats import Element, Format

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and what they mean.

    Attributes:
        codes: integers as int8 [rows, columns]; floating point as uint8 bit patterns (fp4: 0 to 15).
        scale: [1], [rows, 1] or [rows, groups]: bfloat16, float8_e4m3fn, for e8m0 uint8 exponents + 127, for absmax
            float32.
        zero_point: int8 in the shape of `scale`, None where symmetric.
        global_scale: float32 [1], None without one; a group's scale is `scale / global_scale`.
        format: the format they are in.
        shape: of the tensor that they stand for.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    format: Format
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32 and rounded once to `dtype`, in `shape`."""
        values = code_values(self.codes, self.format.kind)
        grouped = values.unflatten(1, (self.scale.shape[-1], -1)) if self.scale.dim() == 2 else values[:, None]
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.float()[..., None]
        scale = self.effective_scale()
        scaled = grouped * (scale[..., None] if scale.dim() == 2 else scale)
        return within_float16(scaled.reshape(self.shape), dtype).to(dtype)

    def effective_scale(self) -> Tensor:
        """What a code's value is multiplied with, float32, in the shape of `scale`."""
        if self.format.scale == "e8m0":
            return torch.exp2(self.scale.float() - 127)
        scale = self.scale.float()
        if self.format.scale == "absmax":
            return scale / self.format.kind.max
        return scale if self.global_scale is None else scale / self.global_scale

    def sliced(self, rows: int, columns: int) -> QuantizedTensor:
        """The leading rows and columns (of the matrix), codes and scales as they are.

        Its values are those of the whole, sliced. Where scales belong to groups and none to the whole tensor, it is
        also what quantizing the slice gives; where they belong to rows, a slice of rows is.

        Raises:
            JointoptError: `columns` splits a group, or a kernel of a convolution.
        """
        scale, zero_point = self.scale, self.zero_point
        if self.scale.dim() == 2:
            groups = self.scale.shape[1]
            if self.format.granularity == "group":
                size = self.codes.shape[1] // groups
                if columns % size:
                    raise JointoptError(f"a slice of {columns} columns splits a group of {size}")
                groups = columns // size
            scale = scale[:rows, :groups]
            zero_point = None if zero_point is None else zero_point[:rows, :groups]
        area = prod(self.shape[2:])
        if columns % area:
            raise JointoptError(f"a slice of {columns} columns splits a kernel of {area}")
        shape = (rows, columns // area, *self.shape[2:])
        return replace(self, codes=self.codes[:rows, :columns], scale=scale, zero_point=zero_point, shape=shape)

    def to(self, device: Any) -> QuantizedTensor:
        moved: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor.to(device)
            for name in ("codes", "scale", "zero_point", "global_scale")
        }
        return replace(self, **moved)


def within_float16(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What of a weight's values float16 could not hold, saturated, where that is the dtype."""
    ends = torch.finfo(torch.float16)
    return values.clamp(ends.min, ends.max) if dtype == torch.float16 else values


def code_values(codes: Tensor, kind: Element) -> Tensor:
    """What codes stand for, float32."""
    if not kind.is_float:
        return codes.float()
    if kind.dtype is not None:
        return codes.view(kind.dtype).float()
    if kind.values is not None:
        return torch.tensor(kind.values, dtype=torch.float32, device=codes.device)[codes.long()]
    signed = [*FP4_VALUES, *(-value for value in FP4_VALUES)]
    table = torch.tensor(signed, dtype=torch.float32, device=codes.device)
    return table[codes.long()]


def value_codes(values: Tensor, kind: Element) -> Tensor:
    """The codes of values that `kind` can hold exactly; of a codebook, of the nearest that it holds."""
    if not kind.is_float:
        return values.to(torch.int8)
    if kind.dtype is not None:
        return values.to(kind.dtype).view(torch.uint8)
    if kind.values is not None:
        return _codebook_codes(values, kind)
    magnitudes = torch.tensor(FP4_VALUES, dtype=torch.float32, device=values.device)
    index = torch.searchsorted(magnitudes, values.abs().contiguous()).to(torch.uint8)
    return index | (torch.signbit(values).to(torch.uint8) << 3)


def _codebook_codes(points: Tensor, kind: Element) -> Tensor:
    """The codes of the nearest values, uint8; halfway points go to the lower one."""
    assert kind.values is not None
    order = sorted(range(len(kind.values)), key=kind.values.__getitem__)
    ascending = torch.tensor(kind.values, dtype=torch.float32, device=points.device)[order]
    index = torch.bucketize(points.float().contiguous(), (ascending[:-1] + ascending[1:]) / 2)
    return torch.tensor(order, dtype=torch.uint8, device=points.device)[index]
