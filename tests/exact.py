"""What number formats hold, in float64 and by search through every value: slow, obvious, and no code of quant's."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

FLOATS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
INTEGERS = {"int8": (-128, 127), "int4": (-8, 7)}
ELEMENTS = (*FLOATS, *INTEGERS)


def codes(element: str) -> np.ndarray:
    """Every bit pattern of a floating point type, uint8."""
    return np.arange(16 if element == "fp4_e2m1" else 256, dtype=np.uint8)


def values(element: str) -> np.ndarray:
    """Every finite value, once, ascending, float64."""
    if element in INTEGERS:
        low, high = INTEGERS[element]
        return np.arange(low, high + 1, dtype=np.float64)
    found = codes(element).view(FLOATS[element]).astype(np.float64)
    return np.unique(found[np.isfinite(found)])


def halfways(element: str) -> np.ndarray:
    """Every point that is as far from one value as from the next, float64 (exact)."""
    held = values(element)
    return (held[1:] + held[:-1]) / 2


def nearest(points: np.ndarray, element: str) -> np.ndarray:
    """The nearest value, ties to the even code, saturating, float64."""
    held = values(element)
    points = np.clip(points.astype(np.float64), held[0], held[-1])
    above = np.searchsorted(held, points).clip(1, len(held) - 1)
    low, high = held[above - 1], held[above]
    down, up = points - low, high - points
    return np.where((down < up) | ((down == up) & _even(low, element)), low, high)


def _even(held: np.ndarray, element: str) -> np.ndarray:
    if element in INTEGERS:
        return held % 2 == 0
    return held.astype(FLOATS[element]).view(np.uint8) % 2 == 0


def distance(points: np.ndarray, element: str) -> np.ndarray:
    """How far the nearest value is, float64."""
    return np.abs(nearest(points, element) - points)


def as_float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()
