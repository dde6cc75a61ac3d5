"""Coordinate descent from GPTQ's rounding: the error falls with every sweep, for every format."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant.formats import SCHEMES, scheme
from quant.kernels import quantize
from quant.reference import round_to_format
from quant.rounding import coordinate_descent
from quant.rounding.compensated import DAMPING, gptq, spread_grid
from quant.rounding.coordinate_descent import descent
from tests.test_quant_gptq import correlated, loss, moments_of

WEIGHTED = [name for name, each in SCHEMES.items() if each.weights is not None]


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_sweep_loses_less(name, monkeypatch):
    form = scheme(name).fitted([128]).weights
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    hessian = moments_of(nn.Linear(128, 16), correlated(400, 128, 0)).hessian()
    damped = hessian + DAMPING * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(128)
    errors = []
    for sweeps in range(4):
        monkeypatch.setattr(coordinate_descent, "SWEEPS", sweeps)
        errors.append(loss(weight, descent(weight, hessian, form).dequantize(), damped))
    assert errors[0] == pytest.approx(loss(weight, gptq(weight, hessian, form).dequantize(), damped))
    assert errors[0] > errors[1]
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("name", ["W4A16_CHANNEL", "W4A16_ASYM", "FP4A16"])
def test_after_many_sweeps_no_column_has_a_better_value_beside_the_others(name, monkeypatch):
    """Of more columns than are taken at a time."""
    form = scheme(name).fitted([192]).weights
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
    hessian = moments_of(nn.Linear(192, 6), correlated(400, 192, 0)).hessian()
    monkeypatch.setattr(coordinate_descent, "SWEEPS", 40)
    found = descent(weight, hessian, form)
    lost, damped = found.dequantize() - weight, hessian[0] + DAMPING * hessian[0].diagonal().mean() * torch.eye(192)
    best = found.dequantize() - lost @ damped / damped.diagonal()  # eq. 5, for each column
    step, zero = spread_grid(found)
    expected = (round_to_format(best / step + zero, form.element) - zero) * step
    moved = (expected - found.dequantize()).abs() > 1e-3 * step
    assert moved.float().mean() < 0.01  # but for what lies halfway


def test_convolutions_in_groups_and_dead_channels():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
    x = torch.randn(4, 8, 9, 9).cumsum(-1)
    x[:, 3] = 0
    hessian = moments_of(layer, x).hessian()
    form = SCHEMES["W4A16_CHANNEL"].weights
    held = descent(layer.weight, hessian, form).dequantize()
    assert loss(layer.weight, held, hessian) < loss(layer.weight, quantize(layer.weight, form).dequantize(), hessian)


def test_where_nothing_comes_in_it_rounds_to_nearest():
    weight, form = torch.randn(4, 128), scheme("NVFP4A16").weights
    found = descent(weight, torch.zeros(1, 128, 128), form)
    assert torch.equal(found.dequantize(), quantize(weight, form).dequantize())
