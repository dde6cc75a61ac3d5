"""What a layer's inputs say about rounding its weight: their first and second moments, streamed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant.errors import JointoptError

HARDLY, CANCELLED = 1e-3, 2.0**-15
"""Variance, as a share of the mean square, below which inputs hardly vary (a classifier's behind few blocks); and what
sums in float32 may be off by where the mean is subtracted, without which their covariance may not be positive."""
NEVER_REACHED = "calibration never reached it; allowed: batches that use every layer"


class InputMoments:
    """Sums over the inputs of one layer, as its weight's columns meet them.

    A convolution's inputs are its patches (im2col), one set a group of channels. Memory is that of the sums, whatever
    the number of inputs.

    Attributes:
        gram: sum of x x^T, float32 [groups, columns, columns].
        lost: sum of (o - x) x^T, o what the original's layer gets in place of x; None where none was ever given.
        lost_total: sum of o - x, float32 [groups, columns].
        total: sum of x, float32 [groups, columns].
        count: number of inputs. In all of these an input counts as often as its weight says.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        columns, groups = layer.get_parameter("weight")[0].numel(), getattr(layer, "groups", 1)
        device = layer.get_parameter("weight").device
        self.gram = torch.zeros(groups, columns, columns, dtype=torch.float32, device=device)
        self.total = torch.zeros(groups, columns, dtype=torch.float32, device=device)
        self.lost: Tensor | None = None
        self.lost_total = torch.zeros_like(self.total)
        self.count = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, original: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Adds inputs: [..., features] of a linear layer, [N, C, H, W] of a convolution (a sample at a time).

        Args:
            original: what the original's layer gets in their place.
            weight: how often each input of a linear layer counts, [...]; None for once.
        """
        convolution = isinstance(self.layer, nn.Conv2d)
        for at, part in enumerate(x if convolution else (x,)):
            columns = input_columns(part, self.layer).float()
            counted = columns if weight is None else columns * weight.reshape(1, -1, 1)
            self.gram.baddbmm_(counted.mT, columns)
            self.total += counted.sum(1)
            self.count += columns.shape[1] if weight is None else float(weight.sum())
            if original is not None:
                beside = original[at] if convolution else original
                lost = input_columns(beside, self.layer).float() - columns
                if weight is not None:
                    lost = lost * weight.reshape(1, -1, 1)
                if self.lost is None:
                    self.lost = torch.zeros_like(self.gram)
                self.lost.baddbmm_(lost.mT, columns)
                self.lost_total += lost.sum(1)

    def reorder(self, order: Tensor) -> None:
        """The weight's columns, of one group, in another order."""
        order = order.to(self.gram.device)
        self.gram, self.total = self.gram[:, order][:, :, order], self.total[:, order]

    def hessian(self, centred: bool = False) -> Tensor:
        """Mean of x x^T, [groups, columns, columns]; `centred`, of (x - mean)(x - mean)^T.

        That of the layer's squared output error, up to a factor (GPTQ, arXiv 2210.17323, eq. 3). Centred it belongs to
        a layer whose bias takes up the mean of the error; where inputs hardly vary, its diagonal is raised by what the
        subtraction may have lost.

        Raises:
            JointoptError: there were no inputs, or some that are not finite.
        """
        if not self.count:
            raise JointoptError(NEVER_REACHED)
        if not self.gram.isfinite().all():
            raise JointoptError("calibration saw inputs that are not finite; allowed: finite numbers")
        mean = self.gram / self.count
        if not centred:
            return mean
        square = mean.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        mean.baddbmm_(self.mean()[:, :, None], self.mean()[:, None], alpha=-1)
        diagonal = mean.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(torch.where(diagonal.mean(-1, keepdim=True) < HARDLY * square, CANCELLED * square, 0.0))
        return mean

    def mean(self) -> Tensor:
        """[groups, columns]."""
        return self.total / self.count

    def original_mean(self) -> Tensor:
        """Of what the original's layer gets, [groups, columns]."""
        return (self.total + self.lost_total) / self.count

    def loss(self, centred: bool = False) -> Tensor:
        """Mean of (o - x) x^T, [groups, columns, columns]; 0 where no original was given. `centred` as `hessian`."""
        if self.lost is None:
            return torch.zeros_like(self.gram)
        mean = self.lost / self.count
        shift = self.lost_total[:, :, None] / self.count
        return mean.baddbmm_(shift, self.mean()[:, None], alpha=-1) if centred else mean


Halves = tuple[InputMoments, InputMoments]
"""Of two parts of the data."""


def joined(halves: Sequence[InputMoments]) -> InputMoments:
    """The moments of all inputs of one layer, without `lost`."""
    whole = InputMoments(halves[0].layer)
    for each in halves:
        whole.gram += each.gram
        whole.total += each.total
        whole.lost_total += each.lost_total
        whole.count += each.count
    return whole


def input_columns(x: Tensor, layer: nn.Module) -> Tensor:
    """Inputs as the weight's columns meet them, [groups, positions, columns]; of a convolution x is [C, H, W]."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x[None], layer._reversed_padding_repeated_twice, mode=mode)
    size: tuple[int, int] = tuple(layer.kernel_size)  # type: ignore[assignment]
    patches = nn.functional.unfold(padded, size, dilation=layer.dilation, stride=layer.stride)[0]
    return patches.unflatten(0, (layer.groups, -1)).mT
