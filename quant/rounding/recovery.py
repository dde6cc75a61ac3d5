"""Before a weight is rounded: what its inputs lost is made good by least squares, as far as that holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.rounding.compensated import DAMPING
from quant.rounding.moments import InputMoments


@torch.no_grad()
def recovered(weight: Tensor, halves: Sequence[InputMoments], centred: bool = False) -> Tensor:
    """The weight whose outputs on a layer's inputs x are nearest to the original's, W o, on inputs not seen.

    Of all weights W + W M comes nearest on the data itself, with M = E[(o - x) x^T] (E[x x^T] + damping)^-1 (the aim of
    GPTAQ, arXiv 2504.02692, met before any rounding). Few inputs tell little of M: from 128 sentences it takes 8 times
    off the divergence of MiniLM in INT8 on the sentences themselves, and more than doubles it on others. So each half
    of the data has its own M, the share of it that is best on the other half is found, and their mean is taken.

    Args:
        weight: [rows, columns], or a convolution's kernel.
        halves: two moments with originals, of different data. Where one saw none, the weight is as it was.
        centred: for a layer whose bias takes up the mean of the error.

    Returns:
        Like `weight`.
    """
    if any(half.lost is None for half in halves):
        return weight
    whole = weight.detach().float().flatten(1).unflatten(0, (len(halves[0].gram), -1))
    lost = [whole @ half.loss(centred) for half in halves]
    changes = [_least_squares(half, each, centred) for half, each in zip(halves, lost, strict=True)]
    share, _ = tried(changes, lost, [half.hessian(centred) for half in halves])
    return (whole + share * (changes[0] + changes[1]) / 2).reshape(weight.shape).to(weight.dtype)


def tried(changes: Sequence[Tensor], wanted: Sequence[Tensor], hessians: Sequence[Tensor]) -> tuple[float, float]:
    """How much of two changes of a weight holds, each tried on the half of the data that it was not fitted to.

    Args:
        changes: [..., rows, columns], each fitted to its half.
        wanted: of each half the error's part along its inputs, E[e x^T], [..., rows, columns].
        hessians: of each half E[x x^T], [..., columns, columns].

    Returns:
        The share from 0 to 1 with which both together lose least, and by how much squared error that is less.
    """
    gained = energy = 0.0
    for change, aim, hessian in zip(changes, reversed(wanted), reversed(hessians), strict=True):
        gained += float((change * aim).sum())
        energy += float((change * (change @ hessian)).sum())
    share = min(max(gained / energy, 0.0), 1.0) if energy > 0 else 0.0
    return share, 2 * share * gained - share**2 * energy


def _least_squares(moments: InputMoments, lost: Tensor, centred: bool) -> Tensor:
    """W M, of W E[(o - x) x^T]; both [groups, rows, columns]."""
    hessian = moments.hessian(centred)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    pull = DAMPING * diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(pull > 0, pull, 1.0)
    return torch.linalg.solve(hessian, lost, left=False)
