"""Samples of average length: what costs are counted and timed for, whatever batches texts are sorted into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each sample, without padding; none where the batch does not say."""
    mask = batch.get("attention_mask")
    return mask.sum(1).tolist() if isinstance(mask, Tensor) and mask.dim() == 2 else []


def of_average_length(batch: Mapping[str, Any], found: Sequence[int], count: int) -> dict[str, Any]:
    """The first `count` samples; where lengths were `found` and the batch has a mask, cut or repeated to their
    average."""
    mask = batch.get("attention_mask")
    width = mask.shape[1] if found and isinstance(mask, Tensor) and mask.dim() == 2 else None
    length = max(1, round(sum(found) / len(found))) if found else 1

    def sized(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if width is None or value.dim() < 2 or value.shape[1] != width:
            return value[:count]
        return value[:count].repeat(1, -(-length // width), *(1,) * (value.dim() - 2))[:, :length]

    return {name: sized(value) for name, value in batch.items()}
