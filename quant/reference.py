"""Quantize and fake-quantize in plain torch: the arithmetic that everything else is tested against.

Weights of any rank are seen as a matrix [rows, columns], a convolution's kernel [O, I, h, w] as [O, I*h*w].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.errors import JointoptError, check_choice
from quant.formats import ELEMENTS, Element, Format, dtype_name
from quant.tensors import QuantizedTensor, code_values, value_codes

NVFP4_GLOBAL_RANGE = 448.0 * 6.0
"""What the largest magnitude of a tensor is mapped to: the largest e4m3 scale times the largest e2m1 value."""
WEIGHT_REACH = 1e38
"""Where a weight's range ends at the latest: a scale of more would make infinities of codes, or be one itself."""
LLM_INT8_OUTLIER = 6.0
"""From which magnitude on LLM.int8 leaves an input's column out (bitsandbytes' default)."""


def round_to_format(tensor: Tensor, element: str) -> Tensor:
    """The nearest value that `element` can hold, ties to even, saturating at its ends; in the tensor's own dtype.

    Infinities saturate, NaN stays NaN (in integers too: these are their values, not yet their codes), zeros keep
    their sign.

    Args:
        tensor: floating point, any shape.
        element: a name of `quant.formats.ELEMENTS`.

    Raises:
        JointoptError: another element, or a tensor that is not floating point.
    """
    check_choice("element", element, ELEMENTS)
    return _round_in_place(_floating(tensor, "tensor").clone(), ELEMENTS[element])


def _floating(tensor: Tensor, what: str) -> Tensor:
    if not tensor.is_floating_point():
        raise JointoptError(f"{what}: found numbers of type {dtype_name(tensor.dtype)}; allowed: floating point")
    return tensor


def _round_in_place(values: Tensor, kind: Element) -> Tensor:
    """In place, since memory for the result of each step takes longer than the steps."""
    values.clamp_(kind.min, kind.max)
    if kind.values is not None:
        return values.copy_(code_values(value_codes(values, kind), kind))
    if not kind.is_float:
        return values.round_()
    if kind.is_e2m1:
        return _round_to_fp4(values)
    if kind.dtype is None or values.dtype == torch.float64:
        return round_to_steps(values, kind)
    return values.copy_(values.to(kind.dtype))


def round_to_steps(clamped: Tensor, kind: Element) -> Tensor:
    """Rounds to a float type that torch has no cast to, or from float64: torch's casts round that to float32 first, and
    ties that are rounded twice go wrong."""
    assert kind.mantissa is not None
    exponent = (torch.frexp(clamped).exponent - 1).clamp(min=kind.exponent_min)
    step = torch.ldexp(torch.ones_like(clamped), exponent - kind.mantissa)
    return (clamped / step).round() * step


def _round_to_fp4(clamped: Tensor) -> Tensor:
    """E2M1, in place: steps of 1/2 below 2, of 1 from 2 to 4, of 2 from 4 to 6; ties go to the even mantissa."""
    magnitude = clamped.abs()
    step = torch.full_like(clamped, 0.5).masked_fill_(magnitude >= 2, 1).masked_fill_(magnitude >= 4, 2)
    return clamped.div_(step).round_().mul_(step)


def grouped_view(matrix: Tensor, format: Format) -> Tensor:
    """[rows, scales a row, elements a scale]; for one scale a tensor [1, 1, all]."""
    if format.granularity == "tensor":
        return matrix.reshape(1, 1, -1)
    if format.granularity in ("channel", "token"):
        return matrix[:, None]
    return matrix.unflatten(1, (format.groups_in(matrix.shape[1]), -1))


def weight_groups(weight: Tensor, format: Format) -> Tensor:
    """A weight in float32 as [rows, scales a row, elements a scale].

    Raises:
        JointoptError: rank below 2, no element, not floating point, not finite, or a group that does not divide.
    """
    _floating(weight, "weight")
    if weight.dim() < 2 or not weight.numel():
        raise JointoptError(f"weight: found shape {tuple(weight.shape)}; allowed: two dimensions or more, none of 0")
    held = weight.detach().float()
    if format.scale == "absmax" and not format.kind.is_float:
        held = held.half().float()  # what LLM.int8 starts from, whatever the model's dtype
    groups = grouped_view(held.flatten(1), format)
    if not groups.isfinite().all():
        beyond = weight.isfinite().all()
        raise JointoptError(
            "weight: found numbers beyond 65504, the largest of LLM.int8's float16"
            if beyond
            else "weight: found NaN or infinity; allowed: finite numbers"
        )
    return groups


Clip = tuple[Tensor, Tensor]
"""(lowest, highest) value to be held, [rows, scales a row]; what lies beyond saturates."""


@torch.no_grad()
def quantize(weight: Tensor, format: Format, clip: Clip | None = None) -> QuantizedTensor:
    """Rounds a weight into a format.

    Scales follow compressed-tensors: symmetric, the larger end over half the code range; asymmetric, the whole range
    over the whole code range, zero included. They are rounded to how they are stored before the weight is divided;
    where that is too coarse for a range (below some 1e-40, or for NVFP4 below 1e-6 of the tensor's largest value) its
    values become 0. Values beyond 1e38 saturate, but in formats of absmax scales. The arithmetic is float32.

    Args:
        weight: floating point, rank 2 or more, all finite.
        format: with granularity tensor, channel or group.
        clip: range to be held for each scale (default: all that is there). NVFP4's global scale is that of the whole
            tensor whatever the clip, so that each group's clip can be chosen apart.

    Raises:
        JointoptError: the weight is of another type or rank, empty, or not finite, or a group does not divide it.
    """
    groups = weight_groups(weight, format)
    low, high = clip if clip is not None else (groups.amin(-1), groups.amax(-1))
    global_scale = global_scale_of(groups.abs().amax()) if format.scale == "e4m3" else None
    scale, zero_point = stored_scale(low, high, format, global_scale)
    if format.granularity == "tensor":
        scale = scale.reshape(1)
        zero_point = None if zero_point is None else zero_point.reshape(1)
    empty = torch.empty(0, dtype=torch.uint8)
    bare = QuantizedTensor(empty, scale, zero_point, global_scale, format, tuple(weight.shape))
    if format.scale == "absmax":  # by the reciprocal, as bitsandbytes' kernels do
        factor = (format.kind.max / scale.clamp(min=1e-38)).clamp(max=torch.finfo(torch.float32).max)
        scaled = groups * factor[..., None]
    else:
        step = bare.effective_scale()
        scaled = groups / (step[..., None] if step.dim() == 2 else step)
    if zero_point is not None:
        scaled = scaled + (zero_point.float()[..., None] if zero_point.dim() == 2 else zero_point.float())
    if format.kind.values is None:
        scaled = _round_in_place(scaled, format.kind)
    codes = value_codes(scaled, format.kind).reshape(len(weight), -1)
    return replace(bare, codes=codes)


def global_scale_of(largest: Tensor) -> Tensor:
    """NVFP4's scale for a whole tensor, float32 [1]: it maps the largest magnitude to the largest that can be held."""
    tiny = torch.finfo(torch.float32).tiny
    found = NVFP4_GLOBAL_RANGE / largest.float().clamp(min=tiny)
    return torch.nan_to_num(found, nan=1.0, posinf=1.0, neginf=1.0).reshape(1)


def stored_scale(
    low: Tensor, high: Tensor, format: Format, global_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The scale of a range as it is stored, and the zero point (int8, None where symmetric), in the range's shape."""
    if format.scale == "absmax":
        return torch.maximum(-low, high).float(), None
    low, high = low.clamp(-WEIGHT_REACH, 0), high.clamp(0, WEIGHT_REACH)
    kind = format.kind
    largest = torch.maximum(-low, high)
    if format.scale == "e8m0":
        return e8m0_exponent(largest, kind), None
    if global_scale is not None:
        scale = (global_scale * divided(largest, (kind.max - kind.min) / 2)).clamp(max=448).to(torch.float8_e4m3fn)
        return torch.where(scale.float() == 0, 0.125, scale.float()).to(torch.float8_e4m3fn), None
    if format.symmetric:
        scale = divided(largest, (kind.max - kind.min) / 2).to(torch.bfloat16)
        return _never_zero(scale), None
    scale = divided(high - low, kind.max - kind.min).to(torch.bfloat16)
    zero_point = (kind.min - low / scale.float()).clamp(kind.min, kind.max).nan_to_num(0.0).round()
    return _never_zero(scale), zero_point.to(torch.int8)


def divided(x: Tensor, number: float) -> Tensor:
    """x / number in float32 at least, in x's dtype. By a tensor: CUDA multiplies by the reciprocal of a plain number,
    which may move a scale by its last bit."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.full((), number, dtype=wide.dtype, device=x.device)).to(x.dtype)


def _never_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale).to(scale.dtype)


def e8m0_exponent(largest: Tensor, kind: Element) -> Tensor:
    """MX's shared exponent + 127, uint8: the power of two that brings the largest magnitude into the element's range.

    floor(log2) less the element's own largest exponent (OCP Microscaling Formats 1.0, section 6.3), where mantissas
    from 1.75, which of e2m1 would round beyond 6, take the next exponent. compressed-tensors does so for every element.
    """
    bits = largest.float().contiguous().view(torch.int32)
    power = (bits + (1 << 21)) & 0x7F800000
    return ((power >> 23) - kind.exponent_max).clamp(0, 254).to(torch.uint8)


def fake_quantize(weight: Tensor, format: Format, clip: Clip | None = None) -> Tensor:
    """Quantize, then dequantize: the values that the format can hold, in the weight's shape and dtype."""
    return quantize(weight, format, clip).dequantize(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    """The identity's gradient for a step function (Bengio, Leonard and Courville, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def fake_quantize_activation(
    x: Tensor,
    format: Format,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """A layer's input as its activation format holds it, in x's dtype; the gradient goes straight through.

    The arithmetic is that of compressed-tensors 0.20, in x's dtype, operation for operation.

    Args:
        x: [..., features], or a convolution's input [N, C, H, W], where a token is one sample and a group is of
            neighbouring channels at one position.
        format: dynamic formats compute their scales here.
        scale, zero_point: of static formats.
        global_scale: of NVFP4.

    Raises:
        JointoptError: x is not floating point, its groups do not divide, or a calibrated constant is missing.
    """
    _floating(x, "activation")
    with torch.no_grad():
        if format.granularity == "group" and x.dim() == 4:
            rounded = _fake_quantized(x.permute(0, 2, 3, 1), format, scale, zero_point, global_scale).permute(
                0, 3, 1, 2
            )
        else:
            rounded = _fake_quantized(x, format, scale, zero_point, global_scale)
    return straight_through(x, rounded)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of the identity where x takes part in one."""
    return _StraightThrough.apply(x, rounded) if x.requires_grad and torch.is_grad_enabled() else rounded


def _fake_quantized(
    x: Tensor, format: Format, scale: Tensor | None, zero_point: Tensor | None, global_scale: Tensor | None
) -> Tensor:
    if format.scale == "absmax":
        return _held_but_outliers(x)
    if format.scale == "e4m3" and global_scale is None:
        raise JointoptError(f"{format.element} activations with e4m3 scales: found no global scale; calibrate first")
    grouped = x.unflatten(-1, (format.groups_in(x.shape[-1]), -1)) if format.granularity == "group" else x
    if format.dynamic and format.granularity == "tensor" and not x.numel():
        return x  # which has no largest element
    if format.dynamic:
        scale, zero_point = _dynamic_scale(grouped, format, global_scale)
    elif scale is None:
        raise JointoptError(f"{format.element} activations are static; found no scale; calibrate first")
    assert scale is not None
    scale = scale.to(x.dtype) if global_scale is None else scale / global_scale  # float32 stays float32
    scaled = grouped / scale
    if zero_point is not None:
        scaled += zero_point.to(x.dtype)
    rounded = _round_in_place(scaled, format.kind).to(scale.dtype)
    if zero_point is not None:
        rounded -= zero_point.to(scale.dtype)
    rounded *= scale
    return rounded.reshape(x.shape).to(x.dtype)


def llm_int8_codes(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's input as LLM.int8 quantizes it (Dettmers et al., arXiv 2208.07339, section 3).

    A column in which any token reaches `LLM_INT8_OUTLIER` stays out, so that the other tokens of a batch matter.

    Args:
        tokens: floating point [tokens, features].

    Returns:
        Codes as float32 [tokens, features], 0 in outlier columns; each token's largest magnitude without its outliers,
        float32 [tokens, 1]; which columns are outliers, bool [features].
    """
    held = tokens.detach().half()
    outliers = held.abs() >= LLM_INT8_OUTLIER
    held = held.masked_fill(outliers, 0)
    largest = held.abs().amax(-1, keepdim=True).float()
    codes = (held * (127 / torch.where(largest == 0, 1, largest))).round_()
    columns = outliers.any(0)
    return codes.masked_fill_(columns, 0), largest, columns


def _held_but_outliers(x: Tensor) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    codes, largest, outliers = llm_int8_codes(tokens)
    return torch.where(outliers, tokens, codes * (largest / 127)).reshape(x.shape).to(x.dtype)


def _shared_dims(x: Tensor, format: Format) -> tuple[int, ...]:
    """The dimensions over which one scale is shared."""
    if format.granularity == "tensor":
        return tuple(range(x.dim()))
    if format.granularity == "token" and x.dim() == 4:
        return tuple(range(1, x.dim()))
    return (-1,)


def _dynamic_scale(x: Tensor, format: Format, global_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    kind = format.kind
    dims = _shared_dims(x, format)
    if format.symmetric:
        largest = x.abs().amax(dims, keepdim=True)
        if format.scale == "e8m0":
            scale = torch.exp2(e8m0_exponent(largest, kind).float() - 127).to(x.dtype)
            return torch.where(scale == 0, 1, scale), None  # float16 has no 2^-127, the scale of zeros
        scale = divided(largest, (kind.max - kind.min) / 2)
        if global_scale is not None:
            scale = (global_scale * scale).clamp(max=448).to(torch.float8_e4m3fn).to(torch.float32)
            return torch.where(scale == 0, 0.125, scale), None
        return _never_zero(scale), None
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    scale = divided(high - low, kind.max - kind.min)
    zero_point = (kind.min - low / scale).clamp(kind.min, kind.max)
    return _never_zero(scale), zero_point.nan_to_num(0.0).round()
