"""Laws of error-compensating rounding: never worse where it counts, for every format, layer and Hessian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quant.errors import JointoptError
from quant.formats import SCHEMES, scheme
from quant.kernels import quantize
from quant.rounding.compensated import gptq, inverse_factor
from quant.rounding.moments import InputMoments, input_columns
from tests.reread import reread

WEIGHTED = [name for name, each in SCHEMES.items() if each.weights is not None]


def correlated(samples: int, columns: int, seed: int) -> Tensor:
    """Inputs as layers see them: few directions carry most, a few channels are large."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    scales = torch.exp(torch.randn(columns, generator=generator))
    return (mixed + 0.5 * torch.randn(samples, columns, generator=generator)) * scales


def loss(weight: Tensor, held: Tensor, hessian: Tensor) -> float:
    lost = (weight.detach() - held).flatten(1).unflatten(0, (len(hessian), -1))
    return float(((lost @ hessian) * lost).sum())


def moments_of(layer: nn.Module, *inputs: Tensor) -> InputMoments:
    moments = InputMoments(layer)
    for x in inputs:
        moments.add(x)
    return moments


@pytest.mark.parametrize("name", WEIGHTED)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_outputs_change_less_than_by_rounding_to_nearest(name, seed):
    form = scheme(name).fitted([128]).weights
    layer = nn.Linear(128, 24)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed))
    hessian = moments_of(layer, correlated(400, 128, seed)).hessian()
    assert loss(weight, gptq(weight, hessian, form).dequantize(), hessian) < loss(
        weight, quantize(weight, form).dequantize(), hessian
    )


@pytest.mark.parametrize("name", WEIGHTED)
def test_scales_are_those_of_rounding_to_nearest_and_codes_survive_storing(name):
    wanted = scheme(name).fitted([128])
    weight, hessian = torch.randn(9, 128), torch.eye(128)[None] + 1
    rounded, nearest = gptq(weight, hessian, wanted.weights), quantize(weight, wanted.weights)
    assert torch.equal(rounded.scale.float(), nearest.scale.float())
    assert rounded.codes.dtype == nearest.codes.dtype
    assert wanted.bitsandbytes or torch.equal(reread(rounded, wanted), rounded.dequantize())


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "BNB_INT8"])  # which divides another way
def test_where_inputs_are_not_correlated_it_rounds_to_nearest(name):
    form = scheme(name).fitted([128]).weights
    weight = torch.randn(5, 128)
    for hessian in (torch.eye(128)[None], torch.diag(torch.rand(128))[None], torch.zeros(1, 128, 128)):
        assert torch.equal(gptq(weight, hessian, form).dequantize(), quantize(weight, form).dequantize())


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (3, 5), "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 8},
    ],
    ids=str,
)
def test_convolutions_of_any_kind(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, bias=False, **options)
    x = torch.randn(4, 8, 9, 9).cumsum(-1)
    columns = input_columns(x[0], layer)
    flat = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
    expected = layer(x[:1])
    torch.testing.assert_close((columns @ flat.mT).mT.flatten(0, 1).reshape(expected.shape[1:]), expected[0])
    form = SCHEMES["W4A16_CHANNEL"].weights
    hessian = moments_of(layer, x).hessian()
    compensated, nearest = gptq(layer.weight, hessian, form), quantize(layer.weight, form)
    assert loss(layer.weight, compensated.dequantize(), hessian) < loss(layer.weight, nearest.dequantize(), hessian)


def test_moments_do_not_depend_on_how_inputs_are_cut():
    layer, x = nn.Linear(6, 2), torch.randn(4, 5, 6)
    one, many = moments_of(layer, x), moments_of(layer, *x)
    torch.testing.assert_close(one.hessian(), many.hessian())
    centred = (x.flatten(0, 1) - x.flatten(0, 1).mean(0)).T.cov(correction=0)
    torch.testing.assert_close(many.hessian(centred=True)[0], centred, atol=1e-5, rtol=1e-4)


def test_singular_hessians_and_dead_channels_are_handled():
    weight = torch.randn(4, 64)
    x = torch.randn(3, 64)
    x[:, ::2] = 0
    moments = moments_of(nn.Linear(64, 4), x)
    form = SCHEMES["W4A16_CHANNEL"].weights
    rounded = gptq(weight, moments.hessian(), form)
    assert torch.equal(rounded.codes[:, ::2], quantize(weight, form).codes[:, ::2])
    assert loss(weight, rounded.dequantize(), moments.hessian()) < loss(
        weight, quantize(weight, form).dequantize(), moments.hessian()
    )


def test_inputs_that_hardly_vary_have_a_hessian_that_can_be_inverted():
    torch.manual_seed(0)
    weight, form = torch.randn(4, 384), SCHEMES["W4A16_CHANNEL"].weights
    x = torch.randn(384) + 3e-4 * torch.randn(64, 2) @ torch.randn(2, 384)
    hessian = moments_of(nn.Linear(384, 4), x).hessian(centred=True)
    assert gptq(weight, hessian, form).dequantize().isfinite().all()


@given(seed=st.integers(0, 10**6), columns=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_the_inverse_factor_is_one(seed, columns):
    x = torch.randn(2, 60, columns, generator=torch.Generator().manual_seed(seed))
    hessian = x.mT @ x
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * torch.diag_embed(
        hessian.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(-1, columns)
    )
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.mT @ factor @ damped, torch.eye(columns).expand(2, -1, -1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("weight", "hessian", "said"),
    [
        (torch.full((2, 8), torch.nan), torch.eye(8)[None], "weight: found NaN"),
        (torch.ones(2, 8), torch.full((1, 8, 8), torch.inf), "Hessian: found NaN or infinity"),
        (torch.ones(2, 8), torch.eye(7)[None], r"Hessian: found shape \(1, 7, 7\); allowed: \[groups, 8, 8\]"),
        (torch.ones(2, 8), -torch.eye(8)[None], "Hessian: singular"),
    ],
)
def test_what_cannot_be_rounded_is_refused(weight, hessian, said):
    with pytest.raises(JointoptError, match=said):
        gptq(weight, hessian, SCHEMES["W4A16_CHANNEL"].weights)


def test_calibration_that_never_came_is_refused():
    with pytest.raises(JointoptError, match="never reached"):
        InputMoments(nn.Linear(2, 2)).hessian()
    with pytest.raises(JointoptError, match="not finite"):
        moments_of(nn.Linear(2, 2), torch.tensor([[torch.inf, 0]])).hessian()


def test_weights_of_zeros_and_of_one_element():
    form = SCHEMES["W4A16_CHANNEL"].weights
    assert not gptq(torch.zeros(3, 8), torch.eye(8)[None], form).dequantize().any()
    assert gptq(torch.ones(1, 1), torch.ones(1, 1, 1), form).dequantize().shape == (1, 1)
