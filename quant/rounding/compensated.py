"""Rounding one column after the other, each error made good by the columns to come (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.errors import JointoptError
from quant.formats import Format
from quant.kernels import quantize
from quant.reference import Clip, round_to_format
from quant.tensors import QuantizedTensor, value_codes

DAMPING = 0.01
"""Added to the Hessian's diagonal, times its mean (GPTQ, section 3.3, step 3); where it is singular, tenfold until it
can be inverted."""
_MOST_DAMPING = 1.0
_COLUMNS = 128


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, format: Format, clip: Clip | None = None) -> QuantizedTensor:
    """Rounds a weight so that the layer's outputs change least, rather than the weight itself.

    Scales are those of `quantize`, chosen before anything is rounded, so that columns can be taken in the order of
    their inputs' energy (act-order) while each stays in its group, as a checkpoint stores it. Columns whose inputs are
    always zero are rounded to nearest.

    Args:
        weight: [rows, columns], or a convolution's kernel [O, I, h, w].
        hessian: of the squared output error, [groups, columns, columns] (`InputMoments.hessian`); groups are a
            convolution's.
        format, clip: see `quantize`.

    Raises:
        JointoptError: a weight that `quantize` refuses, a Hessian of another shape, or one that is not finite or not
            positive even when damped by its own mean.
    """
    nearest = quantize(weight, format, clip)
    columns = nearest.codes.shape[1]
    if hessian.shape[1:] != (columns, columns) or len(weight) % len(hessian):
        raise JointoptError(f"Hessian: found shape {tuple(hessian.shape)}; allowed: [groups, {columns}, {columns}]")
    if not hessian.isfinite().all():
        raise JointoptError("Hessian: found NaN or infinity; allowed: finite numbers")
    groups = len(hessian)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows_order = order[:, None].expand(-1, len(weight) // groups, -1)

    def ordered(matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (groups, -1)).gather(-1, rows_order)

    sorted_hessian = hessian.float().gather(1, order[..., None].expand_as(hessian))
    sorted_hessian = sorted_hessian.gather(2, order[:, None].expand_as(hessian))
    step, zero = (ordered(matrix) for matrix in spread_grid(nearest))
    rounded = _rounded_in_turn(
        ordered(weight.detach().float().flatten(1)), step, zero, inverse_factor(sorted_hessian, DAMPING), format
    )
    in_place = torch.empty_like(rounded).scatter_(-1, rows_order, rounded).flatten(0, 1)
    return replace(nearest, codes=value_codes(in_place, format.kind))


def spread_grid(quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Step and zero point of every element, float32 [rows, columns]."""
    shape, scale = quantized.codes.shape, quantized.effective_scale()
    zero = torch.zeros_like(scale) if quantized.zero_point is None else quantized.zero_point.float()

    def spread(values: Tensor) -> Tensor:
        if values.dim() == 1:
            return values.expand(shape)
        return values.repeat_interleave(shape[1] // values.shape[1], 1)

    return spread(scale), spread(zero)


def _rounded_in_turn(weight: Tensor, step: Tensor, zero: Tensor, factor: Tensor, format: Format) -> Tensor:
    """Elements in the format's own units, all [groups, rows, columns] (GPTQ, algorithm 1); `weight` is used up."""
    rounded = torch.empty_like(weight)
    columns = weight.shape[-1]
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        errors = torch.empty_like(weight[..., start:stop])
        for at in range(start, stop):
            column, unit, shift = weight[..., at], step[..., at], zero[..., at]
            units = round_to_format(column / unit + shift, format.element)
            rounded[..., at] = units
            error = (column - (units - shift) * unit) / factor[:, at, at, None]
            errors[..., at - start] = error
            weight[..., at:stop] -= error[..., None] * factor[:, None, at, at:stop]
        weight[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return rounded


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = (hessian + damping)^-1, [groups, columns, columns].

    With J the reversal of rows, J hessian J = L L^T gives hessian = (J L J)(J L J)^T, and U is the inverse of J L J.

    Raises:
        JointoptError: the Hessian is not positive, however it is damped.
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, 1.0)[:, None]
    while damping <= _MOST_DAMPING:
        damped = hessian.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(-1, -2))
        if not failed.any():
            identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
            factor = torch.linalg.solve_triangular(lower.flip(-1, -2), identity, upper=True)
            if factor.isfinite().all():
                return factor
        damping *= 10
    raise JointoptError(f"Hessian: singular, even with {_MOST_DAMPING:g} of its mean added to its diagonal")
