"""Equality to the bit: of tensors, quantized tensors, NaN and the signs of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant.tensors import QuantizedTensor

if TYPE_CHECKING:
    from jointopt import Study

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    """Equal dtype, shape and bits; any NaN is equal to any other."""
    if found is None or expected is None:
        return found is expected
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    nothing, missing = (each.float().isnan() for each in (found, expected))
    patterns = [each.contiguous().view(_INTEGERS[each.element_size()])[~missing] for each in (found, expected)]
    return torch.equal(nothing, missing) and torch.equal(*patterns)


def same_codes(found: QuantizedTensor, expected: QuantizedTensor) -> bool:
    parts = ("codes", "scale", "zero_point", "global_scale")
    return found.shape == expected.shape and all(same(getattr(found, p), getattr(expected, p)) for p in parts)


def dump(study: Study) -> list[dict]:
    """What was evaluated and found, without the time that it took."""
    return study.evaluations().drop(columns="seconds").fillna("none").to_dict("records")
