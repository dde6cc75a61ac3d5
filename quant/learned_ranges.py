"""Learned step sizes: the ranges that formats of weights and of static activations hold, trained with the weights.

Gradients are those of LSQ (Esser et al., arXiv 1902.08153, equations 3 and 5; the scale of a step's gradient is that of
section 2.2). With a zero point both ends of the range are learned, as step and offset are in LSQ+ (Bhalgat et al.,
arXiv 2004.09576). Floating point elements follow by the same derivation, their rounding passed straight through.

What is learned is a factor of the calibrated range: [1, rows, scales a row] of a symmetric format, [2, rows, scales a
row] (of its lower and its upper end) of an asymmetric one; or 1 in place of rows and of scales that share it, as of
inputs, which have one range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.formats import Element, Format, Scheme
from quant.reference import Clip, grouped_view
from quant.tensors import QuantizedTensor, code_values

LEAST = 1 / 16
"""Of a calibrated range: the least that may be left of it."""


Constants = Mapping[str, Tensor | None]
"""Of a static activation format: `input_scale`, and `input_zero_point` where it has one."""


def is_learnable(format: Format) -> bool:
    """Of a weight's format: all but bitsandbytes', whose scale is the largest magnitude itself."""
    return format.scale != "absmax"


def has_learnable_inputs(scheme: Scheme) -> bool:
    """Whether the inputs of a scheme have one constant range."""
    return scheme.activations is not None and not scheme.activations.dynamic


def ends(format: Format) -> int:
    """How many ends of a range are learned apart."""
    return 1 if format.symmetric else 2


def factors(values: Tensor, columns: int, pace: float = 1.0) -> Tensor:
    """What ranges are multiplied by, from the values that are trained, which begin as 0.

    A weight is about 1 / sqrt(columns) large, and AdamW moves whatever it trains by about its learning rate: with
    sqrt(columns) ranges and weights change by the same share (LSQ, section 2.2: the ratio R is 1), and `pace` times it.

    Args:
        columns: of the whole layer, however narrow the slice is.
    """
    return (1 + pace * math.sqrt(columns) * values).clamp(min=LEAST)


def widened(clip: Clip, factor: Tensor) -> Clip:
    """A calibrated range, times its factor."""
    return clip[0] * factor[0], clip[1] * factor[-1]


def input_range(format: Format, constants: Constants) -> Clip:
    """The range that a static format holds by its constants."""
    scale, zero = constants["input_scale"], constants.get("input_zero_point")
    assert scale is not None
    kind = format.kind
    if zero is None:
        end = (kind.max - kind.min) / 2 * scale.float()
        return -end, end
    return (kind.min - zero.float()) * scale.float(), (kind.max - zero.float()) * scale.float()


def learn_range(weight: Tensor, held: Tensor, quantized: QuantizedTensor, factor: Tensor) -> Tensor:
    """`held`, through which gradients reach the weight and the factor of its range.

    Args:
        weight: what was rounded, or a leading slice of it.
        held: the values that `quantized`, codes and scales of that slice, stands for.
        factor: the one that its range was multiplied by. Its gradient is that of LSQ's step times the step over the
            factor, scaled by 1 / sqrt(weights that share it x the largest code).
    """
    return _LearnedRange.apply(weight, held, quantized, factor)


class _LearnedRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, held: Tensor, quantized: QuantizedTensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(weight, factor)
        ctx.quantized = quantized
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (gradient,) = outputs
        weight, factor = ctx.saved_tensors
        quantized: QuantizedTensor = ctx.quantized
        form, kind = quantized.format, quantized.format.kind
        matrices = (weight.flatten(1), gradient.flatten(1), code_values(quantized.codes, kind))
        values, arriving, codes = (grouped_view(each.float(), form) for each in matrices)
        step = quantized.effective_scale().reshape(*codes.shape[:2], 1)
        zero = quantized.zero_point
        shift = None if zero is None else zero.float().reshape(step.shape)
        passed, of_factor = _gradients(values, arriving, codes, step, shift, factor, kind)
        return passed.reshape(gradient.shape).to(gradient.dtype), None, None, of_factor


def learn_input_range(x: Tensor, held: Tensor, format: Format, constants: Constants, factor: Tensor) -> Tensor:
    """`held`, through which gradients reach a layer's inputs and the factor of their static range.

    Args:
        x: what was rounded, of any shape.
        held: what it became, by `constants`: those of the widened range.
        factor: [1, 1, 1], or [2, 1, 1] with a zero point.
    """
    return _LearnedInputRange.apply(x, held, format, constants["input_scale"], constants["input_zero_point"], factor)


class _LearnedInputRange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: Tensor, format: Format, scale: Tensor, zero_point: Tensor | None, factor: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, held, scale, zero_point, factor)
        ctx.kind = format.kind
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        x, held, scale, zero_point, factor = ctx.saved_tensors
        step = scale.float().reshape(1, 1, 1)
        shift = None if zero_point is None else zero_point.float().reshape(1, 1, 1)
        values, arriving, rounded = (each.float().reshape(1, 1, -1) for each in (x, gradient, held))
        codes = rounded / step + (0.0 if shift is None else shift)
        passed, of_factor = _gradients(values, arriving, codes, step, shift, factor, ctx.kind)
        return passed.reshape(gradient.shape).to(gradient.dtype), None, None, None, None, of_factor


def _gradients(
    values: Tensor, arriving: Tensor, codes: Tensor, step: Tensor, shift: Tensor | None, factor: Tensor, kind: Element
) -> tuple[Tensor, Tensor]:
    """Of the values that were rounded, and of the factor of their range.

    Args:
        values, arriving, codes: [rows, scales a row, values that share a scale]; what was rounded, the gradient of what
            it became, and the values of its codes.
        step, shift: [rows, scales a row, 1]; the scale and, where there is one, the zero point.
    """
    zero = 0.0 if shift is None else shift
    points = values / step
    above, below = points + zero > kind.max, points + zero < kind.min
    inside = ~(above | below)
    error = (codes - zero - points) * inside
    if shift is None:
        of_ends = (arriving * torch.where(inside, error, codes)).sum(-1)[None] * step[..., 0]
    else:
        # The range is (low, high) = (min - zero, max - zero) x step, and what lies beyond an end becomes it.
        share = error / (kind.max - kind.min)
        of_low = (arriving * (below.float() - share)).sum(-1) * ((kind.min - shift) * step)[..., 0]
        of_high = (arriving * (above.float() + share)).sum(-1) * ((kind.max - shift) * step)[..., 0]
        of_ends = torch.stack([of_low, of_high])
    shared = values.numel() * len(factor) / factor.numel()
    of_factor = of_ends.sum_to_size(factor.shape) / factor / math.sqrt(shared * kind.max)
    return arriving * inside, of_factor.to(factor.dtype)
