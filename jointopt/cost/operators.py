"""The operators that a network consists of, as their shapes say, and what a model of latency answers about them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from quant.errors import JointoptError, did_you_mean
from quant.formats import SCHEMES, Scheme


@dataclass(frozen=True)
class Operator:
    """One module's work for one sample, or one of the products of attention.

    Attributes:
        kind: "linear", "conv", "embedding", "norm", "attention" (its two products), or "cache": reading keys and values
            of earlier tokens, in whatever runs attention.
        rows: outputs at each position; of attention, channels of all query heads.
        columns: inputs at each position (of a convolution, channels of a group); of attention, channels of all key
            heads.
        positions: at which it is applied (tokens, output pixels); of attention, queries.
        context: keys that each query of attention meets; 0 elsewhere.
        area: of a convolution's kernel.
        stride: of a convolution, positions of its input for each of its output, in both directions together.
        heads: of attention, of its queries; of a convolution, groups.
        scheme: its number formats, None where it is not quantized.
        reader: of a convolution the number formats of what alone reads it (`Layer.readers`), where these are the same.
        weight_bytes: of what it stores, scales included.
        bits: of the model's own numbers, 32 or 16.
        reduces: whether its outputs are partial sums where the width that it reads is spread over several devices.
        cache_bytes: of keys and values that it reads, for the whole context.
        once: whether it runs once for all samples of a batch.
    """

    kind: str
    rows: int
    columns: int
    positions: float
    context: float = 0.0
    area: int = 1
    stride: int = 1
    heads: int = 1
    scheme: Scheme | None = None
    reader: Scheme | None = None
    weight_bytes: float = 0.0
    bits: int = 32
    reduces: bool = False
    cache_bytes: float = 0.0
    once: bool = False

    def samples(self, batch: int) -> int:
        """How many times its work is done for a batch."""
        return 1 if self.once else batch

    @property
    def macs(self) -> float:
        """Products of one sample."""
        if self.kind == "attention":
            return 2 * self.positions * self.context * self.rows
        return self.positions * self.rows * self.columns * self.area if self.kind in ("linear", "conv") else 0.0

    @property
    def fused(self) -> bool:
        """Whether a convolution and the rounding of its output for its reader are one kernel in ONNX Runtime, which
        takes both in static integers (`jointopt.checkpoint.onnx.convolutions`)."""
        return self.kind == "conv" and _static_integers(self.scheme) and _static_integers(self.reader)

    @property
    def kernel(self) -> str:
        """Operators of one kernel do their work alike: "linear W4A16", "conv 3x3 W8A8_STATIC fused"."""
        side = round(math.sqrt(self.area))
        grouped = " grouped" if self.heads > 1 else ""
        kind = f"conv {side}x{side}{grouped}" if self.kind == "conv" else self.kind
        return f"{kind} {_without_group(self.scheme)}{' fused' if self.fused else ''}"

    @property
    def input_bytes(self) -> float:
        """Of its inputs, in the format that it reads them in."""
        scheme = self.scheme
        bits = scheme.activations.bits if scheme is not None and scheme.activations is not None else self.bits
        if self.kind == "attention":
            return self.positions * self.rows * self.bits / 8
        groups = self.heads if self.kind == "conv" else 1
        return self.positions * self.stride * self.columns * groups * bits / 8

    @property
    def output_bytes(self) -> float:
        return self.positions * self.rows * self.bits / 8


def _without_group(scheme: Scheme | None) -> str:
    """The name of the scheme that this one is with other groups, if there is one."""
    if scheme is None:
        return "none"
    name = re.sub(r"_G\d+", "", scheme.name)
    return name if name in SCHEMES else scheme.name


_KERNEL = re.compile(r"(?:linear|embedding|norm|attention|cache|conv (\d+)x\1(?: grouped)?) (\S+)(?: fused)?")


def check_kernel(name: str) -> None:
    """Raises JointoptError, which says what was found, for what is no `Operator.kernel`."""
    found = _KERNEL.fullmatch(name)
    if found is None or found[2] not in SCHEMES:
        hint = did_you_mean(found[2], SCHEMES) if found else ""
        raise JointoptError(
            f"kernel {name!r}{hint}; allowed: linear, embedding, norm, attention, cache, conv 3x3 or conv 3x3 "
            "grouped, then the name of a scheme without its group, then fused or nothing"
        )


def _static_integers(scheme: Scheme | None) -> bool:
    form = None if scheme is None else scheme.activations
    return form is not None and not form.dynamic and not form.kind.is_float


@dataclass(frozen=True)
class Answer:
    """What an operator takes, of a whole batch.

    Attributes:
        seconds: its time.
        joules: its energy.
    """

    seconds: float
    joules: float


class LatencyModel(Protocol):
    """Says what an operator takes on a device.

    Attributes:
        source: where its answers come from, as a report says it: "roofline of NVIDIA A100 80GB SXM".
        batch: samples that are computed together.
        context: tokens of a sample, None for as many as calibration samples have on average.
        capacity: bytes of memory of all devices together.
    """

    @property
    def source(self) -> str: ...

    @property
    def batch(self) -> int: ...

    @property
    def context(self) -> int | None: ...

    @property
    def capacity(self) -> float: ...

    def described(self) -> dict[str, Any]:
        """All that its answers depend on, as JSON can hold it."""

    def answer(self, operator: Operator) -> Answer:
        """What `batch` samples of the operator take."""


def times_to_fit(model: str, genomes: Sequence[Any], seconds: Sequence[float], fewest: int) -> np.ndarray:
    """End-to-end times, as an array. Raises JointoptError for too few, for others than one a genome, for no times."""
    if len(seconds) < fewest or len(genomes) != len(seconds):
        raise JointoptError(f"{model}: found {len(seconds)} times to fit by; allowed: {fewest} or more, one a genome")
    for each in seconds:
        if not isinstance(each, int | float | np.number) or not 0 < each < math.inf:
            raise JointoptError(f"{model}: found a time of {each!r} s; allowed: above 0")
    if len({np.shape(each) for each in genomes}) > 1:
        raise JointoptError(f"{model}: found genomes of several shapes; allowed: one index a gene")
    return np.array(seconds, dtype=np.float64)
