"""What a number format is, and the named schemes: frozen data, no behaviour beyond what follows from it.

A format says how numbers are held: their element type, which of them share a scale, and how that scale is held. A
scheme is a layer's weight format and activation format together, named as compressed-tensors names its presets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch

from quant.errors import JointoptError, check_choice, check_count, did_you_mean

_FLOATS = {torch.float8_e4m3fn: (3, -6, 448.0), torch.float8_e5m2: (2, -14, 57344.0)}
"""Mantissa bits, exponent of the smallest normal number, and largest number."""


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name without its library's: "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Element:
    """A type of number.

    Attributes:
        bits: width in storage: 4, or that of `dtype`. An integer of fewer is stored as one of int8.
        max, min: the ends of its range, zero inside; conversions saturate there.
        mantissa, exponent_min: for floating point, mantissa bits and the exponent of the smallest normal number.
        dtype: torch's own type, where it has one: int8, float8_e4m3fn or float8_e5m2.
        values: of a codebook, which has 4 bits, what each code stands for; rounding is to the nearest, at halfway
            points to the lower.

    Raises:
        JointoptError: what no code could be stored as, or computed with.
    """

    name: str
    bits: int
    min: float
    max: float
    mantissa: int | None = None
    exponent_min: int = 0
    dtype: torch.dtype | None = None
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.bits != (4 if self.dtype is None else 8 * self.dtype.itemsize):
            self._refuse(
                f"{self.bits} bits, dtype {self.dtype}",
                "4 bits, or those of a dtype (an integer from -32 to 31 has 8 bits and dtype torch.int8)",
            )
        if self.dtype not in (None, torch.int8, *_FLOATS):
            self._refuse(f"dtype {self.dtype}", f"{', '.join(map(str, (torch.int8, *_FLOATS)))}, or 4 bits without one")
        if not -math.inf < self.min < 0 < self.max < math.inf:
            self._refuse(f"min {self.min}, max {self.max}", "finite numbers below and above 0")
        if self.values is not None:
            self._check_values(self.values)
        elif self.dtype in _FLOATS:
            self._check_float(*_FLOATS[self.dtype])
        elif self.dtype is not None or self.mantissa is None:
            self._check_integer()

    def _refuse(self, found: str, allowed: str) -> NoReturn:
        raise JointoptError(f"element {self.name!r}: found {found}; allowed: {allowed}")

    def _check_values(self, values: tuple[float, ...]) -> None:
        if self.dtype is not None:
            self._refuse(f"values and dtype {self.dtype}", "values of 4 bits, without a dtype")
        if not 2 <= len(values) <= 16:
            self._refuse(f"{len(values)} values", "2 to 16, as many as 4 bits tell apart")
        if not all(self.min <= value <= self.max for value in values):
            self._refuse(f"values {values}", f"those from min {self.min} to max {self.max}")

    def _check_float(self, mantissa: int, exponent_min: int, most: float) -> None:
        if (self.mantissa, self.exponent_min) != (mantissa, exponent_min) or not -self.min == self.max <= most:
            self._refuse(
                f"{self.dtype}, mantissa {self.mantissa}, exponent_min {self.exponent_min}, {self.min} to {self.max}",
                f"of this dtype mantissa {mantissa}, exponent_min {exponent_min}, a range up to -{most:g} to {most:g}",
            )

    def _check_integer(self) -> None:
        if self.mantissa is not None:
            self._refuse(f"mantissa {self.mantissa} with dtype {self.dtype}", "an integer, without one")
        most = 1 << (self.bits - 1)
        if not (-most <= self.min and self.max < most and all(float(end).is_integer() for end in (self.min, self.max))):
            self._refuse(f"{self.min} to {self.max}", f"whole numbers, of {self.bits} bits -{most} to {most - 1}")

    @property
    def is_float(self) -> bool:
        return self.mantissa is not None or self.values is not None

    @property
    def is_e2m1(self) -> bool:
        return (self.bits, self.min, self.max, self.mantissa, self.exponent_min) == (4, -6, 6, 1, 0)

    @property
    def exponent_max(self) -> int:
        """The exponent of the largest number."""
        return math.frexp(self.max)[1] - 1


# Dettmers et al., arXiv 2305.14314, appendix E: quantiles of the normal distribution.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' own FP4, in the order of its codes: not E2M1, whose smallest value would be 1 and not 1/16.
_FP4_BNB = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))

ELEMENTS = {
    element.name: element
    for element in (
        Element("int8", 8, -128, 127, dtype=torch.int8),
        Element("int4", 4, -8, 7),
        Element("fp8_e4m3", 8, -448, 448, 3, -6, torch.float8_e4m3fn),
        Element("fp8_e5m2", 8, -57344, 57344, 2, -14, torch.float8_e5m2),
        Element("fp4_e2m1", 4, -6, 6, 1, 0),
        Element("nf4", 4, -1, 1, values=_NF4),
        Element("fp4_bnb", 4, -1, 1, values=_FP4_BNB),
    )
}

GRANULARITIES = ("tensor", "channel", "token", "group")
SCALES = {"bfloat16": 16, "e4m3": 8, "e8m0": 8, "absmax": 32}
GROUP_SIZES = (128, 64, 32)
COMPRESSED = {
    "int-quantized": (("int8",), "bfloat16"),
    "pack-quantized": (("int4", "int8"), "bfloat16"),
    "float-quantized": (("fp8_e4m3",), "bfloat16"),
    "nvfp4-pack-quantized": (("fp4_e2m1",), "e4m3"),
    "mxfp4-pack-quantized": (("fp4_e2m1",), "e8m0"),
}
"""Formats of compressed-tensors -> elements and scale of weights that each stores."""
COMPUTED = ("int8", "int4", "fp8_e4m3", "fp4_e2m1")
"""Elements that compressed-tensors rounds inputs to."""


@dataclass(frozen=True)
class Format:
    """How numbers are held.

    Attributes:
        element: a name of `ELEMENTS`.
        granularity: what shares a scale: the "tensor"; a "channel", one output row of a weight; a "token", one
            vector of an activation (of a convolution's input, one sample); or a "group" of `group_size` neighbours.
        group_size: for "group": a number; None where the largest of 128, 64, 32 that divides is to be taken.
        symmetric: False adds a zero point (integers only).
        scale: how a weight's scale is stored: "bfloat16", "e8m0" (a power of two, MX), "e4m3" (NVFP4, with one
            float32 scale for the whole tensor) or "absmax" (bitsandbytes: the largest magnitude itself, float32; of
            an activation's int8, with outlier columns left as they are). Computed scales are rounded to this before
            anything is rounded by them, so that what is scored is what is stored.
        dynamic: for activations, whether scales come from each input rather than from calibration, which finds one
            for the whole tensor. NVFP4's activations have dynamic group scales and a calibrated global one.

    Raises:
        JointoptError: an unknown name, or what is not computed together.
    """

    element: str
    granularity: str
    group_size: int | None = None
    symmetric: bool = True
    scale: str = "bfloat16"
    dynamic: bool = False

    def __post_init__(self) -> None:
        for key, found, allowed in (
            ("element", self.element, tuple(ELEMENTS)),
            ("granularity", self.granularity, GRANULARITIES),
            ("scale", self.scale, tuple(SCALES)),
        ):
            check_choice(f"format {key}", found, allowed)
        kind = self.kind
        if kind.mantissa is not None and kind.bits == 4 and not kind.is_e2m1:
            raise JointoptError(f"format element: found {self.element!r}; allowed of 4-bit floating point: E2M1 alone")
        if not self.symmetric and kind.is_float:
            raise JointoptError(f"format: {self.element} with a zero point; allowed: asymmetric int8, int4")
        if not self.symmetric and self.scale != "bfloat16":
            raise JointoptError(f"format scale: found {self.scale!r} with a zero point; allowed: bfloat16")
        if kind.values is not None and self.scale in ("e8m0", "e4m3"):
            raise JointoptError(
                f"format scale: found {self.scale!r} of the codebook {self.element}; allowed: bfloat16, absmax"
            )
        check_count("format group_size", self.group_size)
        if self.group_size is not None and self.granularity != "group":
            raise JointoptError(f"format: a group size with granularity {self.granularity!r}; allowed: 'group'")

    @property
    def kind(self) -> Element:
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of one element, without scales."""
        return self.kind.bits

    def groups_in(self, columns: int) -> int:
        """How many groups `columns` make. Raises JointoptError where the size is still open or does not divide."""
        if self.group_size is None or columns % self.group_size:
            raise JointoptError(f"{columns} columns in groups of {self.group_size}; allowed: a size that divides")
        return columns // self.group_size


_LLM_INT8 = Format("int8", "token", dynamic=True, scale="absmax")
BITSANDBYTES = {
    "llm_int8": (Format("int8", "channel", scale="absmax"), _LLM_INT8),
    "nf4": (Format("nf4", "group", scale="absmax"), None),
    "fp4": (Format("fp4_bnb", "group", scale="absmax"), None),
}
"""Formats of bitsandbytes -> those of weights, of any group size, and of activations."""


@dataclass(frozen=True)
class Scheme:
    """A layer's weight format and the format of its input; None is left as it is.

    Attributes:
        compressed: the format by which compressed-tensors stores it, None where it has none.
        bitsandbytes: bitsandbytes' name of it. A whole-model format: beside it a model has unquantized layers only.

    Raises:
        JointoptError: formats that no layer computes with, or that the named library does not store.
    """

    name: str
    weights: Format | None = None
    activations: Format | None = None
    compressed: str | None = None
    bitsandbytes: str | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            if self.activations is not None:
                self._refuse("activations", "None without weights", "a format beside that of weights")
            return
        if self.weights.granularity == "token":
            self._refuse("weights", "granularity 'token'", "tensor, channel, group")
        if self.activations is not None:
            self._check_activations(self.activations, self.weights)
        if self.compressed is not None:
            self._check_compressed(self.compressed)
        if self.bitsandbytes is not None:
            self._check_bitsandbytes(self.bitsandbytes)

    def _refuse(self, key: str, found: str, allowed: str) -> NoReturn:
        raise JointoptError(f"scheme {self.name}: {key}: found {found}; allowed: {allowed}")

    def _check_activations(self, form: Format, weights: Format) -> None:
        if not form.dynamic and (form.granularity, form.scale) != ("tensor", "bfloat16"):
            self._refuse(
                "activations",
                f"static ones of granularity {form.granularity!r}, scale {form.scale!r}",
                "dynamic=True; or static ones of granularity 'tensor', scale 'bfloat16'",
            )
        if form.scale == "absmax" and (form != _LLM_INT8 or self.bitsandbytes != "llm_int8"):
            self._refuse("activations", "scale 'absmax'", "those of bitsandbytes 'llm_int8', dynamic int8 a token")
        open_ones = [each for each in (form, weights) if each.granularity == "group" and each.group_size is None]
        if form.granularity == "group" and open_ones:
            self._refuse("activations", "groups of an open size", "a group_size for each format of groups")

    def _check_compressed(self, name: str) -> None:
        assert self.weights is not None
        check_choice(f"scheme {self.name}: compressed", name, COMPRESSED)
        elements, scale = COMPRESSED[name]
        if self.weights.element not in elements or self.weights.scale != scale:
            found = f"weights of {self.weights.element}, scale {self.weights.scale!r}"
            self._refuse("compressed", found, f"in {name}: {' or '.join(elements)}, scale {scale!r}")
        if self.activations is not None and self.activations.element not in COMPUTED:
            self._refuse("compressed", f"activations of {self.activations.element}", f"there: {', '.join(COMPUTED)}")

    def _check_bitsandbytes(self, name: str) -> None:
        assert self.weights is not None
        check_choice(f"scheme {self.name}: bitsandbytes", name, BITSANDBYTES)
        weights, activations = BITSANDBYTES[name]
        if (replace(self.weights, group_size=None), self.activations) != (weights, activations):
            self._refuse("bitsandbytes", "formats of another kind", f"in {name}: {weights}, {activations}")

    @property
    def bits(self) -> float:
        """Stored bits of one weight, with its group's share of scale and zero point; 32 for unquantized weights."""
        if self.weights is None:
            return 32.0
        shared = SCALES[self.weights.scale] + (0 if self.weights.symmetric else self.weights.bits)
        return self.weights.bits + (
            shared / (self.weights.group_size or 128) if self.weights.granularity == "group" else 0
        )

    @property
    def needs_constants(self) -> bool:
        """Whether the activation format has constants that calibration must find."""
        return self.activations is not None and (not self.activations.dynamic or self.activations.scale == "e4m3")

    def fitted(self, columns: Iterable[int]) -> Scheme:
        """The scheme with a group size that divides every one of `columns` (widths of the weight seen as a matrix).

        Raises:
            JointoptError: none divides, with the widths and what was tried.
        """
        widths = sorted(set(columns))
        formats = [f for f in (self.weights, self.activations) if f is not None and f.granularity == "group"]
        if not formats:
            return self
        fixed = [f.group_size for f in formats if f.group_size is not None]
        tried = (max(fixed),) if fixed else GROUP_SIZES
        for size in tried:
            if all(width % size == 0 for width in widths):
                return self if fixed else self._with_group(size)
        raise JointoptError(
            f"{self.name} needs widths that are multiples of {' or '.join(map(str, tried))}; "
            f"found {', '.join(map(str, widths))}"
        )

    def _with_group(self, size: int) -> Scheme:
        assert self.weights is not None
        return replace(self, name=f"{self.name}_G{size}", weights=replace(self.weights, group_size=size))


_INT8_TOKEN = Format("int8", "token", dynamic=True)
_FP8_TOKEN = Format("fp8_e4m3", "token", dynamic=True)
_NVFP4 = Format("fp4_e2m1", "group", 16, scale="e4m3")
_MXFP4 = Format("fp4_e2m1", "group", 32, scale="e8m0")

SCHEMES = {
    each.name: each
    for each in (
        Scheme("none"),
        Scheme("W8A8", Format("int8", "channel"), _INT8_TOKEN, "int-quantized"),
        Scheme("W8A8_STATIC", Format("int8", "channel"), Format("int8", "tensor"), "int-quantized"),
        Scheme(
            "W8A8_STATIC_ASYM", Format("int8", "channel"), Format("int8", "tensor", symmetric=False), "int-quantized"
        ),
        Scheme("W8A8_ASYM", Format("int8", "channel"), replace(_INT8_TOKEN, symmetric=False), "int-quantized"),
        Scheme("W8A8_ASYM_BOTH", Format("int8", "channel", symmetric=False), replace(_INT8_TOKEN, symmetric=False)),
        Scheme("W8A16", Format("int8", "group"), None, "pack-quantized"),
        Scheme("W8A16_CHANNEL", Format("int8", "channel"), None, "pack-quantized"),
        Scheme("W4A16", Format("int4", "group"), None, "pack-quantized"),
        Scheme("W4A16_ASYM", Format("int4", "group", symmetric=False), None, "pack-quantized"),
        Scheme("W4A16_CHANNEL", Format("int4", "channel"), None, "pack-quantized"),
        Scheme("W4A8", Format("int4", "group"), _INT8_TOKEN, "pack-quantized"),
        Scheme("W4A4", Format("int4", "group"), Format("int4", "token", dynamic=True), "pack-quantized"),
        Scheme("FP8", Format("fp8_e4m3", "tensor"), Format("fp8_e4m3", "tensor"), "float-quantized"),
        Scheme("FP8_DYNAMIC", Format("fp8_e4m3", "channel"), _FP8_TOKEN, "float-quantized"),
        Scheme("FP8_E5M2", Format("fp8_e5m2", "channel"), Format("fp8_e5m2", "token", dynamic=True)),
        Scheme("FP8A16", Format("fp8_e4m3", "channel")),
        Scheme("FP4A16", Format("fp4_e2m1", "group")),
        Scheme("NVFP4", _NVFP4, replace(_NVFP4, dynamic=True), "nvfp4-pack-quantized"),
        Scheme("NVFP4A16", _NVFP4, None, "nvfp4-pack-quantized"),
        Scheme("MXFP4", _MXFP4, replace(_MXFP4, dynamic=True), "mxfp4-pack-quantized"),
        Scheme("MXFP4A16", _MXFP4, None, "mxfp4-pack-quantized"),
        Scheme(
            "BNB_INT8",
            Format("int8", "channel", scale="absmax"),
            _LLM_INT8,
            bitsandbytes="llm_int8",
        ),
        Scheme("BNB_NF4", Format("nf4", "group", 64, scale="absmax"), bitsandbytes="nf4"),
        Scheme("BNB_FP4", Format("fp4_bnb", "group", 64, scale="absmax"), bitsandbytes="fp4"),
    )
}


def scheme(name: str) -> Scheme:
    """The scheme of that name; group-wise ones also with the size written out: "W4A16_G64".

    Raises:
        JointoptError: no such scheme, with the nearest name.
    """
    if isinstance(name, str) and name in SCHEMES:
        return SCHEMES[name]
    base, _, group = str(name).rpartition("_G")
    if base in SCHEMES and re.fullmatch(r"\d+", group):
        wanted = SCHEMES[base]
        if wanted.weights is not None and wanted.weights.granularity == "group" and wanted.weights.group_size is None:
            if int(group) in GROUP_SIZES:
                return wanted._with_group(int(group))
            raise JointoptError(f"scheme {name!r}: groups of {group}; allowed: {', '.join(map(str, GROUP_SIZES))}")
    raise JointoptError(
        f"scheme {name!r}: unknown{did_you_mean(name, SCHEMES)}; allowed: {', '.join(SCHEMES)}, and what is put into "
        "quant.formats.SCHEMES"
    )


_SHIPPED_ELEMENTS, _SHIPPED_SCHEMES = dict(ELEMENTS), dict(SCHEMES)


def own_definition(wanted: Scheme) -> dict[str, Any] | None:
    """All that a scheme is, its elements included; None where it is one of jointopt's as it ships, which its name says.

    Args:
        wanted: a scheme of any group size.
    """
    formats = [each for each in (wanted.weights, wanted.activations) if each is not None]
    elements = {each.element: each.kind for each in formats}
    if _is_shipped(wanted) and all(_SHIPPED_ELEMENTS.get(name) == kind for name, kind in elements.items()):
        return None
    return {**asdict(wanted), "elements": {name: asdict(kind) for name, kind in elements.items()}}


def _is_shipped(wanted: Scheme) -> bool:
    if wanted == _SHIPPED_SCHEMES.get(wanted.name):
        return True
    open_one = _SHIPPED_SCHEMES.get(wanted.name.rpartition("_G")[0])
    if open_one is None or open_one.weights is None or wanted.weights is None or wanted.weights.group_size is None:
        return False
    return open_one._with_group(wanted.weights.group_size) == wanted
