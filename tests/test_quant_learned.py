"""Positions between a format's values: they begin at the codes, and what they hold is what they export."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.formats import ELEMENTS, SCHEMES, Element, Format, scheme
from quant.kernels import quantize
from quant.rounding.compensated import gptq
from quant.rounding.learned import positions

WEIGHTED = [name for name, each in SCHEMES.items() if each.weights is not None]


def weight_of(seed: int) -> torch.Tensor:
    return torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))


@given(name=st.sampled_from(WEIGHTED), seed=st.integers(0, 50), compensated=st.booleans())
def test_positions_begin_where_the_codes_are(name, seed, compensated):
    form, weight = scheme(name).fitted([128]).weights, weight_of(seed)
    inputs = weight_of(seed + 1).cumsum(1)
    rounded = gptq(weight, (inputs.T @ inputs)[None], form) if compensated else quantize(weight, form)
    place = positions(rounded, weight)
    still = torch.zeros_like(place.start)
    assert torch.equal(place.held(still), rounded.dequantize())
    assert torch.equal(place.moved(still).dequantize(), rounded.dequantize())


@pytest.mark.parametrize("name", ["W4A16", "NVFP4A16", "FP8A16", "W4A16_ASYM"])
def test_positions_of_what_was_rounded_to_nearest_are_the_weight_itself(name):
    form, weight = scheme(name).fitted([128]).weights, weight_of(0)
    place = positions(quantize(weight, form), weight)
    there = (place.start - place.zero) * place.step
    near = (there - weight).abs() <= 0.011 * place.spacing * place.step
    assert near.float().mean() > 0.99  # beyond the last value, a weight is out of reach


@given(name=st.sampled_from(WEIGHTED), seed=st.integers(0, 50), far=st.floats(0.1, 3))
def test_what_is_held_while_learning_is_what_the_codes_stand_for(name, seed, far):
    form, weight = scheme(name).fitted([128]).weights, weight_of(seed)
    place = positions(quantize(weight, form), weight)
    moves = far * weight_of(seed + 1)
    assert torch.equal(place.held(moves), place.moved(moves).dequantize())


def test_gradients_reach_moves_by_the_distance_between_values():
    form, weight = scheme("MXFP4A16").weights, weight_of(0)
    place = positions(quantize(weight, form), weight)
    moves = torch.zeros_like(place.start, requires_grad=True)
    place.held(moves).sum().backward()
    assert torch.equal(moves.grad, place.spacing * place.step)
    assert set(place.spacing.unique().tolist()) <= {0.5, 0.75, 1.0, 1.5, 2.0}


def test_a_codebook_of_one_s_own_may_have_fewer_values_than_codes(monkeypatch):
    monkeypatch.setitem(ELEMENTS, "ternary", Element("ternary", 4, -1, 1, values=(0.0, -1.0, 1.0)))
    weight = weight_of(0)
    rounded = quantize(weight, Format("ternary", "group", 32))
    place = positions(rounded, weight)
    assert torch.equal(place.held(torch.zeros_like(place.start)), rounded.dequantize())
    assert set(place.spacing.unique().tolist()) == {1.0}
