"""Observers: from data to clipping ranges. For weights at once, for activations over a stream of batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant.errors import JointoptError, check_choice
from quant.formats import Format
from quant.kernels import fake_quantize
from quant.reference import (
    Clip,
    global_scale_of,
    grouped_view,
    round_to_format,
    stored_scale,
    weight_groups,
)

WEIGHT_METHODS = ("minmax", "percentile", "mse")
PERCENTILE = 0.999
_SHRINK = torch.linspace(1.0, 0.5, 26, dtype=torch.float32).tolist()


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
    check_choice("calibration", method, WEIGHT_METHODS)
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
        held = grouped_view(fake_quantize(weight.float(), format, tried).flatten(1), format)
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


ACTIVATION_METHODS = ("minmax", "average", "percentile", "mse", "entropy")
ACTIVATION_PERCENTILE = 0.9999
MOMENTUM = 0.1
"""Of the moving average: what a batch's ends count against those before it."""
_BINS = 4096
_FRACTIONS = torch.linspace(0.02, 1.0, 50, dtype=torch.float32).tolist()


class Histogram:
    """Counts of values in 4096 equal bins from -reach to reach, reach a power of two that grows with what comes.

    Growing joins bins in pairs, so that the counts do not depend on the order or the number of batches.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.reach = 0.0

    def add(self, x: Tensor) -> None:
        """Adds finite values."""
        largest = float(x.abs().max())
        if largest == 0 and self.reach == 0:
            self.reach = 2.0**-126
        while largest >= self.reach:
            if self.reach == 0:
                self.reach = 2.0 ** (math.frexp(largest)[1])
                continue
            joined = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(joined, (_BINS // 4, _BINS // 4))
            self.reach *= 2
        at = (x.flatten().double() * (_BINS / 2 / self.reach)).floor().long() + _BINS // 2
        self.counts = self.counts.to(x.device) + torch.bincount(at, minlength=_BINS)

    def centres(self) -> Tensor:
        """Middle of each bin, float64 [4096]."""
        at = torch.arange(_BINS, dtype=torch.float64, device=self.counts.device)
        return (at + 0.5 - _BINS / 2) * (2 * self.reach / _BINS)

    def quantile(self, q: float) -> float:
        """The middle of the bin below which a share of `q` lies."""
        below = self.counts.cumsum(0)
        return float(self.centres()[(below < q * below[-1]).sum().clamp(max=_BINS - 1)])


class ActivationObserver:
    """The range of a layer's inputs over all batches, and the constants of a static format that follow from it.

    Batches are not kept: memory is two numbers, or a histogram.

    Args:
        format: of the inputs. Of NVFP4, whose groups have scales of their own, only the global scale is calibrated,
            and that from the largest magnitude whatever the method.
        method: "minmax", all that was seen; "average", the moving average of the batches' ends; "percentile", from
            the 0.01st to the 99.99th; "mse", the share of the largest magnitude, 0.02 to 1 in steps of 0.02, with the
            least squared error; "entropy", the share whose rounded distribution is nearest to the true one by KL
            divergence (Migacz, "8-bit inference with TensorRT", GTC 2017), the bin at 0 no fuller than
            its neighbours.

    Raises:
        JointoptError: an unknown method.
    """

    def __init__(self, format: Format, method: str = "minmax"):
        check_choice("calibration", method, ACTIVATION_METHODS)
        self.format, self.method = format, method
        self.low = torch.tensor(torch.inf, dtype=torch.float32)
        self.high = torch.tensor(-torch.inf, dtype=torch.float32)
        self.histogram = None if method in ("minmax", "average") or format.scale == "e4m3" else Histogram()
        self._average: tuple[Tensor, Tensor] | None = None

    def observe(self, x: Tensor) -> None:
        """Takes in a layer's inputs, of any shape."""
        if not x.numel():
            return
        low, high = x.detach().float().aminmax()
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)
        if self.method == "average":
            before = self._average or (low, high)
            self._average = torch.lerp(before[0], low, MOMENTUM), torch.lerp(before[1], high, MOMENTUM)
        if self.histogram is not None and self.low.isfinite() and self.high.isfinite():
            self.histogram.add(x.detach().float())

    def constants(self) -> dict[str, Tensor]:
        """`input_scale` (bfloat16 values, [1]) and `input_zero_point` (int8), or NVFP4's `input_global_scale`.

        Raises:
            JointoptError: nothing was observed, or something that is not finite.
        """
        if not (self.low.isfinite() and self.high.isfinite()):
            found = "no input" if self.low > self.high else "inputs that are not finite"
            raise JointoptError(f"calibration saw {found}; allowed: finite numbers, in one batch or more")
        if self.format.scale == "e4m3":
            return {"input_global_scale": global_scale_of(torch.maximum(-self.low, self.high))}
        return static_constants(self._range(), self.format)

    def _range(self) -> tuple[Tensor, Tensor]:
        if self._average is not None:
            return self._average
        if self.histogram is None:
            return self.low, self.high
        if self.method == "percentile":
            quantiles = (self.histogram.quantile(q) for q in (1 - ACTIVATION_PERCENTILE, ACTIVATION_PERCENTILE))
            low, high = (torch.tensor(end, device=self.low.device, dtype=torch.float32) for end in quantiles)
            return torch.maximum(low, self.low), torch.minimum(high, self.high)
        lost = _squared_error if self.method == "mse" else _divergence
        ends = torch.maximum(-self.low, self.high) * self.low.new_tensor(_FRACTIONS)
        tried = [(torch.maximum(self.low, -end), torch.minimum(self.high, end)) for end in ends]
        losses = [lost(self.histogram, low, high, self.format) for low, high in tried]
        return tried[min(range(len(tried)), key=losses.__getitem__)]


def static_constants(clip: Clip, format: Format) -> dict[str, Tensor]:
    """`input_scale` and, where the format has one, `input_zero_point` of a range, two numbers."""
    low, high = clip
    scale, zero_point = stored_scale(low.reshape(1), high.reshape(1), format, None)
    return {"input_scale": scale} if zero_point is None else {"input_scale": scale, "input_zero_point": zero_point}


def _held_centres(histogram: Histogram, low: Tensor, high: Tensor, format: Format) -> Tensor:
    """What the bins' middles become in a static format that holds this range."""
    scale, zero_point = stored_scale(low.reshape(1), high.reshape(1), format, None)
    scale = scale.float()
    shift = 0.0 if zero_point is None else zero_point.float()
    return (round_to_format(histogram.centres().float() / scale + shift, format.element) - shift) * scale


def _squared_error(histogram: Histogram, low: Tensor, high: Tensor, format: Format) -> float:
    lost = histogram.centres() - _held_centres(histogram, low, high, format)
    return float((lost.square() * histogram.counts).sum())


def _with_level_zero(counts: Tensor) -> Tensor:
    """The bin that begins at 0 has no more than the fuller of its neighbours: every range holds zeros exactly, and
    those of a ReLU would else be most of what a divergence sees. pytorch-quantization's HistogramCalibrator gives that
    bin its neighbour's count, too."""
    zero = _BINS // 2
    counts[zero] = torch.minimum(counts[zero], counts[[zero - 1, zero + 1]].max())
    return counts


def _divergence(histogram: Histogram, low: Tensor, high: Tensor, format: Format) -> float:
    """KL divergence of the rounded distribution from the true one, what lies beyond the range counted at its ends.

    The rounded one spreads the mass that each code has inside the range evenly over the bins that had some of it.
    """
    counts, centres = _with_level_zero(histogram.counts.double()), histogram.centres()
    low, high = low.clamp(max=0).double(), high.clamp(min=0).double()
    if format.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    half = histogram.reach / _BINS  # a bin is inside where it overlaps, or the largest value would not be in its own
    inside = (centres + half > low) & (centres - half <= high)
    kept, filled = counts * inside, (counts > 0) & inside
    _, code = _held_centres(histogram, low.float(), high.float(), format).unique(return_inverse=True)
    mass = torch.zeros(int(code.max()) + 1, dtype=torch.float64, device=counts.device)
    rounded = mass.index_add(0, code, kept) / mass.index_add(0, code, filled.double()).clamp(min=1)
    true = kept.clone()
    first, last = inside.nonzero()[[0, -1], 0]
    true[first] += counts[:first].sum()
    true[last] += counts[last + 1 :].sum()
    spread = torch.where(filled, rounded[code], 0.0)
    true, spread = true / true.sum(), spread / spread.sum().clamp(min=1)
    seen = true > 0
    return float((true[seen] * (true[seen] / spread[seen].clamp(min=1e-12)).log()).sum())
