"""Observers: from data to clipping ranges. For weights at once, for activations over a stream of batches."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import JointoptError, did_you_mean
from quant.formats import Format
from quant.reference import Clip, global_scale_of, grouped_view, quantize, stored_scale, weight_groups

METHODS = ("minmax", "percentile", "mse")
PERCENTILE = 0.999
_SHRINK = torch.linspace(1.0, 0.5, 26).tolist()


@torch.no_grad()
def choose_clip(weight: Tensor, format: Format, method: str = "minmax", importance: Tensor | None = None) -> Clip:
    """The range of a weight that its format is to hold, for each of its scales.

    Args:
        method: "minmax", all of it; "percentile", from the 0.1st to the 99.9th of each scale's values; "mse", the
            fraction of all of it, 0.5 to 1 in steps of 0.02, whose rounding has the least squared error.
        importance: for "mse", what an error in each element counts: the mean square of the inputs that meet it,
            [rows or 1, columns] of the weight as a matrix (default: all alike).

    Returns:
        (lowest, highest), each [rows, scales a row].

    Raises:
        JointoptError: an unknown method, or a weight that `quantize` refuses.
    """
    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise JointoptError(f"calibration: found {method!r}{hint}; allowed: {', '.join(METHODS)}")
    groups = weight_groups(weight, format)
    low, high = groups.amin(-1), groups.amax(-1)
    if method == "minmax":
        return low, high
    if method == "percentile":
        return _quantile(groups, 1 - PERCENTILE), _quantile(groups, PERCENTILE)
    counts = grouped_view(importance.expand(len(weight), -1), format) if importance is not None else 1.0
    best = torch.full_like(low, torch.inf)
    chosen = (low.clone(), high.clone())
    for fraction in _SHRINK:
        tried = (low * fraction, high * fraction)
        held = grouped_view(quantize(weight, format, tried).dequantize().flatten(1), format)
        error = ((held - groups).square() * counts).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = tuple(torch.where(better, new, old) for new, old in zip(tried, chosen, strict=True))  # type: ignore[assignment]
    return chosen


def _quantile(groups: Tensor, q: float) -> Tensor:
    """Over the last dimension, interpolated linearly (torch.quantile takes no more than 2^24 values)."""
    ordered = groups.sort(-1).values
    at = q * (groups.shape[-1] - 1)
    left = int(at)
    right = min(left + 1, groups.shape[-1] - 1)
    return torch.lerp(ordered[..., left], ordered[..., right], at - left)


class ActivationObserver:
    """The range of a layer's inputs over all batches, and the constants of a static format that follow from it."""

    def __init__(self, format: Format):
        self.format = format
        self.low = torch.tensor(torch.inf)
        self.high = torch.tensor(-torch.inf)

    def observe(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = x.detach().float().aminmax()
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)

    def constants(self) -> dict[str, Tensor]:
        """`input_scale` (bfloat16 values, [1]) and `input_zero_point` (int8), or NVFP4's `input_global_scale`.

        Raises:
            JointoptError: nothing was observed, or something that is not finite.
        """
        if not (self.low.isfinite() and self.high.isfinite()):
            found = "no input" if self.low > self.high else "inputs that are not finite"
            raise JointoptError(f"calibration saw {found}; allowed: finite numbers, in one batch or more")
        low, high = self.low, self.high
        if self.format.scale == "e4m3":
            return {"input_global_scale": global_scale_of(torch.maximum(-low, high))}
        scale, zero_point = stored_scale(low.reshape(1), high.reshape(1), self.format, None)
        return {"input_scale": scale} if zero_point is None else {"input_scale": scale, "input_zero_point": zero_point}
