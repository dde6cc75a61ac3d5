"""In which format an attention layer's cache holds its keys and values, or the inputs that they are computed from.

Keys have a few channels that are large in every token, so that their scales belong to channels, and must be known
before the first token comes: calibration finds them. Values have not, and each token's vector of a head has a scale of
its own, computed when it comes (KIVI, arXiv 2402.02750, section 3; KVQuant, arXiv 2401.18079). The inputs of a
layer, cached in their place, have a scale for each group of channels of a token (XQuant, arXiv 2508.10395).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import JointoptError, check_choice
from quant.formats import ELEMENTS, GROUP_SIZES, Element, Format
from quant.reference import stored_scale


@dataclass(frozen=True)
class CacheFormat:
    """How one layer's cache holds what attention reads of earlier tokens.

    Attributes:
        element: a name of `quant.formats.ELEMENTS`; None leaves keys and values as they are. Integers have zero points.
        inputs: True caches the layer's input in place of keys and values, which are computed from it again.
    """

    name: str
    element: str | None = None
    inputs: bool = False

    @property
    def kind(self) -> Element:
        assert self.element is not None
        return ELEMENTS[self.element]

    @property
    def symmetric(self) -> bool:
        return self.kind.is_float

    def format(self, granularity: str) -> Format:
        return Format(self.kind.name, granularity, symmetric=self.symmetric)

    def token_bytes(self, heads: int, head_dim: int, hidden: int, itemsize: int) -> int:
        """Bytes that one token takes in the cache of one layer.

        Args:
            heads: key (and value) heads.
            hidden: channels of the layer's input.
            itemsize: bytes of an unquantized number.
        """
        if self.element is None:
            return 2 * heads * head_dim * itemsize
        scale = 2 if self.symmetric else 3
        if self.inputs:
            return hidden * self.kind.bits // 8 + hidden // input_group(hidden) * scale
        return heads * (2 * head_dim * self.kind.bits // 8 + scale)

    def constant_bytes(self, heads: int, head_dim: int) -> int:
        """Bytes of the keys' scales and zero points in the checkpoint."""
        if self.element is None or self.inputs:
            return 0
        return heads * head_dim * (2 if self.symmetric else 3)


CACHE_FORMATS = {
    each.name: each
    for each in (
        CacheFormat("none"),
        CacheFormat("INT8", "int8"),
        CacheFormat("INT4", "int4"),
        CacheFormat("FP8", "fp8_e4m3"),
        CacheFormat("FP4", "fp4_e2m1"),
        CacheFormat("X_INT8", "int8", inputs=True),
        CacheFormat("X_INT4", "int4", inputs=True),
    )
}


def cache_format(name: str) -> CacheFormat:
    """The format of that name. Raises JointoptError where there is none, with the nearest name."""
    check_choice("cache format", name, CACHE_FORMATS)
    return CACHE_FORMATS[name]


def input_group(hidden: int) -> int:
    """Channels of a layer's input that share a scale.

    Raises:
        JointoptError: none of 128, 64 and 32 divides.
    """
    for size in GROUP_SIZES:
        if hidden % size == 0:
            return size
    raise JointoptError(f"cached inputs need a multiple of {GROUP_SIZES[-1]} channels; found {hidden}")


class KeyObserver:
    """The range of each channel of an attention layer's keys, after their rotation, over all batches.

    Attributes:
        low, high: [heads, head_dim], None before anything was observed.
    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def observe(self, keys: Tensor) -> None:
        """Keys [tokens, heads, head_dim], padding left out."""
        if not len(keys):
            return
        low, high = keys.detach().float().aminmax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def reorder(self, order: Tensor) -> None:
        """The heads in another order."""
        if self.low is not None and self.high is not None:
            order = order.to(self.low.device)
            self.low, self.high = self.low[order], self.high[order]

    def constants(self, form: CacheFormat) -> dict[str, Tensor]:
        """`key_scale` (bfloat16) and, for integers, `key_zero_point` (int8): [heads, head_dim].

        Raises:
            JointoptError: nothing was observed, or something that is not finite.
        """
        if self.low is None or self.high is None:
            raise JointoptError("calibration saw no keys; allowed: finite numbers, in one batch or more")
        if not (self.low.isfinite().all() and self.high.isfinite().all()):
            raise JointoptError("calibration saw keys that are not finite; allowed: finite numbers")
        scale, zero_point = stored_scale(self.low, self.high, form.format("channel"), None)
        return {"key_scale": scale} if zero_point is None else {"key_scale": scale, "key_zero_point": zero_point}


def by_bytes(names: Sequence[str]) -> list[int]:
    """Indices of cache formats from the smallest to the largest; inputs, larger under GQA, after keys and values."""

    def weight(index: int) -> tuple[int, bool]:
        form = cache_format(str(names[index]))
        return (32 if form.element is None else form.kind.bits, form.inputs)

    return sorted(range(len(names)), key=weight)
