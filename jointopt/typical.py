"""Samples of average length: what costs are counted and timed for, whatever batches texts are sorted into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each sample, without padding; none where the batch does not say."""
    mask = batch.get("attention_mask")
    return mask.sum(1).tolist() if isinstance(mask, Tensor) and mask.dim() == 2 else []


def of_average_length(batch: Mapping[str, Any], found: Sequence[int]) -> dict[str, Any]:
    """The batch; where lengths were `found` and it has a mask, its texts cut or repeated to their average."""
    mask = batch.get("attention_mask")
    if not found or not isinstance(mask, Tensor) or mask.dim() != 2:
        return dict(batch)
    length, shape = max(1, round(sum(found) / len(found))), mask.shape

    def sized(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        return value.repeat(1, -(-length // shape[1]), *(1,) * (value.dim() - 2))[:, :length]

    return {name: sized(value) for name, value in batch.items()}
