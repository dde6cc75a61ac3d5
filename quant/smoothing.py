"""Scales of channels, moved from what makes them into the layers that read them: SmoothQuant's and AWQ's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.formats import Format
from quant.kernels import fake_quantize

MIGRATION = 0.5
"""How much of the difficulty goes into the weights: a of SmoothQuant's equation 4."""
EXPONENTS = tuple(step / 20 for step in range(20))


def smooth_scale(activations: Tensor, weights: Tensor) -> Tensor:
    """By what each channel is divided, and its weights multiplied: max|x|^a / max|w|^(1 - a) (SmoothQuant, arXiv
    2211.10438, eq. 4).

    Args:
        activations, weights: largest magnitude of each channel, and of the columns that read it, [channels].

    Returns:
        float32 [channels], 1 for a channel that is never used or never read.
    """
    activations, weights = activations.float(), weights.float()
    scale = activations**MIGRATION / weights ** (1 - MIGRATION)
    return torch.where((activations > 0) & (weights > 0), scale, 1.0)


@torch.no_grad()
def awq_scale(magnitudes: Tensor, read: Tensor, readers: Sequence[tuple[Tensor, Tensor, Format]]) -> Tensor:
    """The scale mean|x|^r whose exponent r, of 0, 0.05, ... 0.95, loses least where the weights are rounded to
    nearest (AWQ, arXiv 2306.00978, eq. 4-5): by the squared error of the readers' outputs.

    Args:
        magnitudes: mean magnitude of each channel, [channels].
        read: index of the channel that each input column of the readers reads, [columns].
        readers: for each layer its weight [rows, columns] or [rows, columns, h, w], some of its inputs
            [tokens, columns], and its format.

    Returns:
        float32 [channels], sqrt(max x min) = 1.
    """
    best, least = torch.ones_like(magnitudes.float()), torch.inf
    for exponent in EXPONENTS:
        scale = magnitudes.float().clamp(min=1e-4) ** exponent
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        error = sum(_output_error(weight, inputs, format, scale[read]) for weight, inputs, format in readers)
        if error < least:
            best, least = scale, error
    return best


def _output_error(weight: Tensor, inputs: Tensor, format: Format, scale: Tensor) -> float:
    weight, by_column = weight.float(), scale.reshape(-1, *[1] * (weight.dim() - 2))
    error = fake_quantize(weight * by_column, format) / by_column - weight
    rows = error.transpose(0, 1).flatten(1)  # of a kernel each position as a layer of its own
    return float((inputs.float() @ rows).square().sum())
