"""Going on from GPTQ: one column at a time is rounded anew against all others (QuantEase, arXiv 2309.01885)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.formats import Format
from quant.reference import Clip, round_to_format
from quant.rounding.compensated import DAMPING, gptq, spread_grid
from quant.tensors import QuantizedTensor, code_values, value_codes

SWEEPS = 4
"""How often it goes over all columns."""

_COLUMNS = 128


@torch.no_grad()
def descent(weight: Tensor, hessian: Tensor, format: Format, clip: Clip | None = None) -> QuantizedTensor:
    """Rounds as `gptq` does, then goes over the columns again: each takes the value that is best beside the others.

    GPTQ's columns know of those before them alone; here the squared output error falls with every column, whatever
    the format (QuantEase, eq. 5 and lemma 1).

    Args:
        weight, hessian, format, clip: see `gptq`.

    Raises:
        JointoptError: what `gptq` refuses.
    """
    start = gptq(weight, hessian, format, clip)
    groups = len(hessian)
    target, step, zero, units = (
        matrix.unflatten(0, (groups, -1))
        for matrix in (
            weight.detach().float().flatten(1),
            *spread_grid(start),
            code_values(start.codes, format.kind),
        )
    )
    units = units.clone()
    damped = hessian.float().clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal += DAMPING * diagonal.mean(-1, keepdim=True)
    lost = (units - zero) * step - target
    for _ in range(SWEEPS):
        for start_at in range(0, target.shape[-1], _COLUMNS):
            part = slice(start_at, min(start_at + _COLUMNS, target.shape[-1]))
            slope, within = lost @ damped[..., part], damped[:, part, part]
            for at in range(part.start, part.stop):
                local = at - part.start
                curvature = diagonal[:, at, None]
                best = lost[..., at] - torch.where(curvature > 0, slope[..., local] / curvature, 0.0)
                tried = (best + target[..., at]) / step[..., at] + zero[..., at]
                units[..., at] = round_to_format(tried, format.element)
                changed = (units[..., at] - zero[..., at]) * step[..., at] - target[..., at] - lost[..., at]
                lost[..., at] += changed
                slope += changed[..., None] * within[:, None, local]
    return replace(start, codes=value_codes(units.flatten(0, 1), format.kind))
