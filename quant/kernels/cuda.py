"""CUDA's kernels, in Triton: the arithmetic of `cpu.cpp`, and so of `quant.reference`, bit for bit.

With TRITON_INTERPRET=1 the kernels run without a GPU, on tensors of the CPU.
"""

# Triton reads the annotations of kernels, so they are not to be strings (no `from __future__ import annotations`).
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.grouped import Job
from quant.reference import WEIGHT_REACH

WIDEST = 8192
"""Elements a program holds; larger groups are searched for their range first."""

_INTEGER, _ASYMMETRIC, _FLOATING = (tl.constexpr(each) for each in range(3))
_GIVEN, _PLAIN, _E8M0, _E4M3 = (tl.constexpr(each) for each in range(4))
_BFLOAT16, _FLOAT16 = tl.constexpr(1), tl.constexpr(2)
_REACH = tl.constexpr(WEIGHT_REACH)
_SIGN, _MAGNITUDE, _INFINITE = tl.constexpr(-(2**31)), tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _in_type(x, TYPE: tl.constexpr):
    """Rounded to a 16-bit type and back, ties to even."""
    if TYPE == _BFLOAT16:
        bits = _bits(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x != x, x, _number(rounded))
    if TYPE == _FLOAT16:
        return x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _with_sign(magnitude, x):
    return _number((_bits(magnitude) & _MAGNITUDE) | (_bits(x) & _SIGN))


@triton.jit
def _to_grid(x, KIND: tl.constexpr, MANTISSA: tl.constexpr, EXPONENT_MIN: tl.constexpr):
    """To an integer below 2^22, or to MANTISSA bits; ties to even. See `to_float_grid` in cpu.cpp."""
    if KIND == _FLOATING:
        exponent = tl.maximum(_bits(x) & _INFINITE, (EXPONENT_MIN + 127) << 23)
        shift = _number((exponent + ((23 - MANTISSA) << 23)) | 0x00400000)
    else:
        shift = tl.full(x.shape, 12582912.0, tl.float32)
    return _with_sign((x + shift) - shift, x)


@triton.jit
def _clamped(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _divided(x, y):
    return tl.div_rn(x, tl.zeros(x.shape, tl.float32) + y)


@triton.jit
def _code(x, MANTISSA: tl.constexpr, EXPONENT_MIN: tl.constexpr, SIGN_BIT: tl.constexpr):
    magnitude = _bits(x) & _MAGNITUDE
    normal = (magnitude >> (23 - MANTISSA)) - ((EXPONENT_MIN + 126) << MANTISSA)
    per_step: tl.constexpr = 2.0 ** (MANTISSA - EXPONENT_MIN)
    small = magnitude < ((EXPONENT_MIN + 127) << 23)
    subnormal = (tl.where(small, _number(magnitude), 0.0) * per_step).to(tl.int32)
    return tl.where(small, subnormal, normal) | (((_bits(x) >> 31) & 1) << SIGN_BIT)


@triton.jit
def _step(
    low, high, whole,
    KIND: tl.constexpr, SCALE: tl.constexpr, STEPS_TYPE: tl.constexpr, QUOTIENT_TYPE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, EXPONENT_MAX: tl.constexpr,
    NEVER_ZERO: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """(the scale as it is stored, as it divides, the zero point) of ranges."""
    largest = tl.where(high > -low, high, -low)
    if KIND == _ASYMMETRIC:
        scale = _in_type(_divided(_in_type(high - low, STEPS_TYPE), HIGH - LOW), QUOTIENT_TYPE)
        point = _clamped(_in_type(LOW - _in_type(_divided(low, scale), STEPS_TYPE), STEPS_TYPE), LOW, HIGH)
        point = _to_grid(tl.where(point != point, 0.0, point), KIND, 0, 0)
        if WEIGHT:
            point = point + 0.0
        scale = tl.where(scale == 0, NEVER_ZERO, scale)
        return scale, scale, point
    if SCALE == _E8M0:
        bits = _bits(largest) & _MAGNITUDE
        bits = tl.where(bits > _INFINITE, 0x7FC00000, bits)  # NaN comes with any bits, to which none can be added
        power = (((bits + (1 << 21)) & _INFINITE) >> 23) - EXPONENT_MAX
        power = tl.minimum(tl.maximum(power, 0), 254)
        scale = _in_type(_number(tl.where(power == 0, 0x00400000, power << 23)), STEPS_TYPE)
        return power.to(tl.float32), tl.where(scale == 0, 1.0, scale), low * 0
    scale = _in_type(_divided(largest, (HIGH - LOW) / 2), QUOTIENT_TYPE)
    if SCALE == _E4M3:
        scale = whole * scale
        scale = _to_grid(tl.where(scale > 448.0, 448.0, scale), _FLOATING, 3, -6)
        scale = tl.where(scale == 0, 0.125, scale)
        return scale, _divided(scale, whole), low * 0
    scale = tl.where(scale == 0, NEVER_ZERO, scale)
    return scale, scale, low * 0


@triton.jit
def _convert(
    x, values, codes, scales, points, lows, highs, whole, groups, size, total,
    KIND: tl.constexpr, SCALE: tl.constexpr, TYPE: tl.constexpr,
    STEPS_TYPE: tl.constexpr, QUOTIENT_TYPE: tl.constexpr,
    MANTISSA: tl.constexpr, EXPONENT_MIN: tl.constexpr, SIGN_BIT: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, EXPONENT_MAX: tl.constexpr,
    NEVER_ZERO: tl.constexpr, WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS groups, WIDTH of their elements: all of them, or ranges are given. Places that are None are not filled."""
    parts = tl.cdiv(size, WIDTH)
    program = tl.program_id(0).to(tl.int64)  # the one dimension of a grid that may have more than 65535
    part = program % parts
    group = program // parts * ROWS + tl.arange(0, ROWS)
    column = part * WIDTH + tl.arange(0, WIDTH)
    here = group < groups
    at = group[:, None] * size + column[None, :]
    inside = here[:, None] & (column < size)[None, :] & (at < total)
    number = tl.load(x + at, mask=inside, other=0)
    number = _number(number.to(tl.int32) << 16) if TYPE == _BFLOAT16 else number.to(tl.float32)
    if SCALE == _GIVEN:
        used = tl.zeros([ROWS], tl.float32) + tl.load(scales)
        point = tl.zeros([ROWS], tl.float32)
        if points is not None:
            point = point + tl.load(points)
    else:
        if lows is not None:
            low = _clamped(tl.load(lows + group, mask=here, other=0), -float("inf"), 0.0)
            high = _clamped(tl.load(highs + group, mask=here, other=0), 0.0, float("inf"))
            low = tl.where(high != high, high, low)
            high = tl.where(low != low, low, high)
        else:
            # Magnitudes compare as their bit patterns do, and NaN as larger than infinity, so that it is found.
            above = _number(tl.max(tl.maximum(_bits(number), 0), 1))
            below = _number(tl.max(tl.maximum(_bits(number) ^ _SIGN, 0), 1))
            high = tl.where(below != below, below, above)
            low = -tl.where(above != above, above, below)
        if WEIGHT:
            low, high = _clamped(low, -_REACH, 0.0), _clamped(high, 0.0, _REACH)
        factor = tl.zeros([ROWS], tl.float32)
        if SCALE == _E4M3:
            factor = factor + tl.load(whole)
        stored, used, point = _step(
            low, high, factor, KIND, SCALE, STEPS_TYPE, QUOTIENT_TYPE, LOW, HIGH, EXPONENT_MAX, NEVER_ZERO, WEIGHT
        )
        if WEIGHT:
            first = tl.where(part == 0, here, False)
            tl.store(scales + group, stored, mask=first)
            tl.store(points + group, point, mask=first)
    used = tl.zeros([ROWS, WIDTH], tl.float32) + used[:, None]
    scaled = _in_type(tl.div_rn(number, used), STEPS_TYPE)
    if KIND == _ASYMMETRIC:
        scaled = _in_type(scaled + point[:, None], STEPS_TYPE)
    held = _to_grid(_clamped(scaled, LOW, HIGH), KIND, MANTISSA, EXPONENT_MIN)
    if WEIGHT and KIND != _FLOATING:
        held = held + 0.0
    if codes is not None:
        pattern = _code(held, MANTISSA, EXPONENT_MIN, SIGN_BIT) if KIND == _FLOATING else held.to(tl.int32)
        tl.store(codes + at, (pattern & 0xFF).to(tl.uint8), mask=inside)
    if values is not None:
        if KIND == _ASYMMETRIC:
            held = _in_type(held - point[:, None], STEPS_TYPE)
        if TYPE == _BFLOAT16:
            tl.store(values + at, (_bits(_in_type(held * used, TYPE)) >> 16).to(tl.int16), mask=inside)
        else:
            tl.store(values + at, (held * used).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _pack(codes, packed, columns, out_columns, total,
          BITS: tl.constexpr, PER: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """PER codes of BITS each in one word, the first lowest; OFFSET makes them unsigned; what is missing is 0."""
    word = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    row, first = word // out_columns, (word % out_columns) * PER
    held = tl.zeros([WIDTH], tl.int32)
    for place in tl.static_range(PER):
        there = (word < total) & (first + place < columns)
        code = tl.load(codes + row * columns + first + place, mask=there, other=0).to(tl.int32)
        held = held | tl.where(there, ((code + OFFSET) & ((1 << BITS) - 1)) << (BITS * place), 0)
    tl.store(packed + word, held.to(packed.dtype.element_ty), mask=word < total)


def convert(job: Job, x: Tensor, groups: int, places: Mapping[str, Tensor | None]) -> int:
    """`KernelBackend.convert`."""
    size = x.numel() // groups
    if job.scale == 0:  # where groups do not matter
        groups, size = triton.cdiv(x.numel(), 1024), 1024
    low, high = places.get("low"), places.get("high")
    width = triton.next_power_of_2(size)
    if width > WIDEST:
        width = WIDEST
        if low is None:
            rows = x.view(groups, size)
            low, high = (end.float() for end in (rows.amin(1), rows.amax(1)))
    rows_here = max(1, min(4096 // width, triton.next_power_of_2(groups)))
    grid = (triton.cdiv(groups, rows_here) * triton.cdiv(size, width),)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _convert[grid](
            _patterns(x), _patterns(places.get("values")), places.get("codes"),
            places.get("scales"), places.get("zero_points"),
            low, high, places.get("global_scale"), groups, size, x.numel(),
            KIND=job.kind, SCALE=job.scale, TYPE=job.type, STEPS_TYPE=job.type if job.steps_in_type else 0,
            QUOTIENT_TYPE=job.quotient_type, MANTISSA=job.mantissa, EXPONENT_MIN=job.exponent_min,
            SIGN_BIT=job.sign_bit, LOW=job.low, HIGH=job.high, EXPONENT_MAX=job.exponent_max,
            NEVER_ZERO=job.never_zero, WEIGHT=job.weight, ROWS=rows_here, WIDTH=width,
            enable_fp_fusion=False,  # no product and sum in one rounding
        )  # fmt: skip
    # With a global scale the largest was looked at before.
    return largest(x) if job.weight and places.get("global_scale") is None else 0


def _patterns(x: Tensor | None) -> Tensor | None:
    """bfloat16 as its bits, which are the upper ones of float32's."""
    return x.view(torch.int16) if x is not None and x.dtype == torch.bfloat16 else x


def largest(x: Tensor) -> int:
    return int(x.abs().amax().float().view(torch.int32))


def pack(codes: Tensor, bits: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Codes [rows, n] of so many bits as words of `dtype` [rows, ceil(n / codes a word)], the first lowest."""
    per_word = dtype.itemsize * 8 // bits
    codes = codes.contiguous()
    rows, columns = codes.shape
    packed = torch.empty(rows, triton.cdiv(columns, per_word), dtype=dtype, device=codes.device)
    if packed.numel():
        grid = (triton.cdiv(packed.numel(), 1024),)
        with torch.cuda.device_of(codes):
            _pack[grid](codes, packed, columns, packed.shape[1], packed.numel(), bits, per_word, offset, WIDTH=1024)
    return packed
