"""What a kernel is told: where groups lie, how their scales come about, and what of the result is wanted.

A backend (cpu.py, cuda.py) has `convert`, which rounds the groups of a contiguous tensor, and `largest`, the bit
pattern of a tensor's largest magnitude as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from quant.errors import JointoptError
from quant.formats import Element, Format
from quant.reference import WEIGHT_REACH, Clip, global_scale_of
from quant.tensors import QuantizedTensor, within_float16

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take; float64 is left to plain torch."""

INTEGER, ASYMMETRIC, FLOATING = range(3)
GIVEN, PLAIN, E8M0, E4M3 = range(4)


@dataclass(frozen=True)
class Job:
    """A format's arithmetic, for tensors of any size.

    Attributes:
        kind: INTEGER, ASYMMETRIC (with a zero point) or FLOATING.
        scale: GIVEN, one for the whole tensor, or of each group: PLAIN, or as E8M0 or E4M3 store it.
        type: index in `TYPES` of what comes in, and of the values that leave.
        steps_in_type: whether each operation on elements is rounded to `type`, or stays in float32.
        quotient_type: index of the type that a scale is rounded to, once the largest magnitude has been divided.
        mantissa, exponent_min: of the element, where it is floating point.
        exponent_max: of the element's largest number.
        low, high: ends of the element's range.
        never_zero: scale in place of 0.
        reach: where ranges end at the latest.
        weight: whether values are those of codes, in which integers have no negative zero.
    """

    kind: int
    scale: int
    type: int
    steps_in_type: bool
    quotient_type: int
    mantissa: int
    exponent_min: int
    exponent_max: int
    low: float
    high: float
    never_zero: float
    reach: float
    weight: bool

    @property
    def half(self) -> float:
        """What a largest magnitude is divided by."""
        return (self.high - self.low) / 2

    @property
    def sign_bit(self) -> int:
        """Of a floating point code."""
        return 3 if self.mantissa == 1 else 7


class KernelBackend(Protocol):
    def convert(self, job: Job, x: Tensor, groups: int, places: Mapping[str, Tensor | None]) -> int:
        """Fills `values` (like x), `codes` (uint8), `scales` as stored and `zero_points` (float32, one a group), each
        where there is a place for it.

        Args:
            x: contiguous, its groups one after the other, not empty.
            places: also what is given: `scales` and `zero_points` of a GIVEN scale, `global_scale`, and `low`, `high`,
                a range for each group; all float32.

        Returns:
            The bit pattern of a weight's largest magnitude as float32, so that infinity and NaN are found.
        """

    def largest(self, x: Tensor) -> int: ...


def takes(x: Tensor, format: Format) -> bool:
    """Whether the kernels hold this tensor in this format; what they do not, plain torch does."""
    blocks = format.scale in ("e8m0", "e4m3") and format.granularity == "group"
    return x.dtype in TYPES and format.kind.values is None and (format.scale == "bfloat16" or blocks)


def job_of(format: Format, dtype: torch.dtype, weight: bool) -> Job:
    """Weights are computed in float32 whatever they come in, activations in their own type."""
    return _job_of(format, format.kind, dtype, weight)


@cache
def _job_of(format: Format, kind: Element, dtype: torch.dtype, weight: bool) -> Job:
    """The element apart, since another may be put under its name."""
    stored = torch.bfloat16 if weight and format.scale == "bfloat16" else torch.float32 if weight else dtype
    given = not weight and not format.dynamic
    return Job(
        kind=FLOATING if kind.is_float else INTEGER if format.symmetric else ASYMMETRIC,
        scale=GIVEN if given else {"bfloat16": PLAIN, "e8m0": E8M0, "e4m3": E4M3}[format.scale],
        type=TYPES.index(dtype),
        steps_in_type=not weight and format.scale != "e4m3" and dtype != torch.float32,
        quotient_type=TYPES.index(stored),
        mantissa=kind.mantissa or 0,
        exponent_min=kind.exponent_min,
        exponent_max=kind.exponent_max,
        low=float(kind.min),
        high=float(kind.max),
        never_zero=torch.finfo(stored).eps,
        reach=WEIGHT_REACH if weight else torch.inf,
        weight=weight,
    )


def activation(
    backend: KernelBackend,
    x: Tensor,
    format: Format,
    scale: Tensor | None,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
) -> Tensor:
    """`fake_quantize_activation` of a tensor that is not empty, without its gradient; static scales are one number.

    Its strides are those that the reference's would have: what computes with it computes the same bits.
    """
    images = x.dim() == 4 and format.granularity != "channel"
    channels_last = images and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    permuted = channels_last or (images and format.granularity == "group")
    rows = x.permute(0, 2, 3, 1) if permuted else x
    groups = len(x) if images and format.granularity == "token" else _groups(rows, format)
    rows = rows.contiguous()
    values = torch.empty_like(rows)
    places: dict[str, Tensor | None] = {"values": values}
    if scale is not None:
        places["scales"] = scale.to(x.dtype).float()
    if zero_point is not None:
        places["zero_points"] = zero_point.to(x.dtype).float()
    if global_scale is not None:
        places["global_scale"] = global_scale.float()
    backend.convert(job_of(format, x.dtype, False), rows, groups, places)
    values = values.permute(0, 3, 1, 2) if permuted else values
    as_it_came = values.stride() == x.stride() or (x.is_contiguous() and not permuted)
    return values if as_it_came else torch.empty_like(x).copy_(values)


def _groups(x: Tensor, format: Format) -> int:
    """How many scales a tensor has that is not empty."""
    if format.granularity == "tensor":
        return 1
    columns = x.shape[-1] if x.dim() else 1
    return x.numel() // columns * (format.groups_in(columns) if format.granularity == "group" else 1)


def weight(
    backend: KernelBackend, whole: Tensor, format: Format, clip: Clip | None, codes: bool, values: bool
) -> tuple[QuantizedTensor | None, Tensor | None]:
    """(`quantize`, `fake_quantize`) of a weight that is not empty, each if it is wanted.

    Raises:
        JointoptError: the weight is not finite, or a group does not divide it.
    """
    rows = whole.detach().contiguous()
    matrix = rows.flatten(1)
    groups = _groups(matrix, format)
    shape = (1,) if format.granularity == "tensor" else (len(matrix), groups // len(matrix))
    global_scale = None
    if format.scale == "e4m3":
        largest = backend.largest(rows)
        _refuse_infinite(largest)
        bits = torch.tensor(largest, dtype=torch.int32, device=rows.device)
        global_scale = global_scale_of(bits.view(torch.float32))
    scales, zero_points = (torch.empty(groups, dtype=torch.float32, device=rows.device) for _ in range(2))
    patterns = torch.empty(matrix.shape, dtype=torch.uint8, device=rows.device) if codes else None
    held = torch.empty_like(rows) if values else None
    places = {"values": held, "codes": patterns, "scales": scales, "zero_points": zero_points}
    if global_scale is not None:
        places["global_scale"] = global_scale
    if clip is not None:
        for name, each in zip(("low", "high"), clip, strict=True):
            places[name] = each.expand(groups // shape[-1], shape[-1]).contiguous()
    _refuse_infinite(backend.convert(job_of(format, rows.dtype, True), rows, groups, places))
    held = None if held is None else within_float16(held, rows.dtype)
    if patterns is None:
        return None, held
    stored = {"bfloat16": torch.bfloat16, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}[format.scale]
    quantized = QuantizedTensor(
        patterns if format.kind.is_float else patterns.view(torch.int8),
        scales.to(stored).view(shape),
        None if format.symmetric else zero_points.to(torch.int8).view(shape),
        global_scale,
        format,
        tuple(whole.shape),
    )
    return quantized, held


def _refuse_infinite(largest: int) -> None:
    if largest >= 0x7F800000:  # of infinity and NaN
        raise JointoptError("weight: found NaN or infinity; allowed: finite numbers")
