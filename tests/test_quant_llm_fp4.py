"""LLM-FP4: searched formats lose less than plain ones, and shifts by powers of two change nothing by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.errors import JointoptError
from quant.llm_fp4 import E1M2, E2M1, E3M0, FloatFormat, LayerFormats, held, plain, pre_shift, search
from quant.reference import round_to_format

RATIOS = tuple(torch.linspace(0.1, 1.2, 12).tolist())


def layer(seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Weight and inputs whose channels differ in size, as those of language models do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 24, generator=generator)
    return weight, torch.randn(40, 24, generator=generator) * torch.exp2(spread * torch.randn(24, generator=generator))


def lost(weight: Tensor, x: Tensor, found: LayerFormats) -> float:
    return float((found.held_input(x) @ found.held_weight(weight).T - x @ weight.T).square().sum())


@given(seed=st.integers(0, 10**6), spread=st.floats(0, 3))
@settings(max_examples=15, deadline=None)
def test_searched_loses_no_more_than_plain(seed, spread):
    weight, x = layer(seed, spread)
    errors = [
        lost(weight, x, plain(weight, x)),
        lost(weight, x, search(weight, x, False, (E2M1,), ratios=(*RATIOS, 1.0))),
    ]
    wider = lost(weight, x, search(weight, x, False, rounds=1, ratios=(*RATIOS, 1.0)))
    assert errors[1] <= errors[0] * (1 + 1e-5)
    assert wider <= errors[0] * (1 + 1e-5)


def test_the_order_of_the_paper_where_channels_differ_much():
    errors = torch.zeros(3)
    for seed in range(5):
        weight, x = layer(seed, 2.0)
        found = plain(weight, x), search(weight, x, False, ratios=RATIOS), search(weight, x, True, ratios=RATIOS)
        errors += torch.tensor([lost(weight, x, each) for each in found])
    assert errors[0] > errors[1] > errors[2]


@given(seed=st.integers(0, 10**6), power=st.integers(-20, 20))
@settings(max_examples=20, deadline=None)
def test_shifts_are_whole_powers_that_do_not_depend_on_the_inputs_unit(seed, power):
    _, x = layer(seed, 2.0)
    shift = pre_shift(x, E2M1)
    assert torch.equal(shift, shift.round()) and shift.min() == 0 and shift.max() <= 3
    assert torch.equal(pre_shift(x * 2.0**power, E2M1), shift)
    assert shift[x.abs().amax(0).argmax()] == 0


def test_e2m1_is_the_element_of_the_schemes_and_the_others_have_no_home():
    x = torch.randn(500) * 4
    assert torch.equal(held(x, FloatFormat(E2M1, torch.tensor(1.0))), round_to_format(x, "fp4_e2m1"))
    weight, inputs = layer(0, 1.0)
    assert plain(weight, inputs).has_home and not plain(weight, inputs, E1M2).has_home


@pytest.mark.parametrize(("element", "values"), [(E1M2, 8), (E2M1, 8), (E3M0, 8)])
def test_every_split_of_the_bits_has_sixteen_codes(element, values):
    x = torch.linspace(0, element.max * 1.5, 4000)
    found = held(x, FloatFormat(element, torch.tensor(1.0))).unique()
    assert len(found) == values and found[-1] == element.max and found[0] == 0


@pytest.mark.parametrize(
    ("weight", "x", "said"),
    [
        (torch.full((2, 4), torch.nan), torch.ones(3, 4), "weight: "),
        (torch.ones(2, 4), torch.ones(0, 4), "inputs: found shape"),
        (torch.ones(2, 4), torch.ones(3, 5), "inputs: found 5 columns; allowed: the weight's 4"),
    ],
)
def test_what_cannot_be_searched_is_refused(weight, x, said):
    with pytest.raises(JointoptError, match=said):
        search(weight, x)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratios": []}, "ratios: found none; allowed: one or more"),
        ({"ratios": [0.5, 0.0]}, "ratios: found .*; allowed: numbers above 0"),
        ({"elements": ()}, "elements: found none; allowed: one or more"),
        ({"rounds": 0}, "rounds: found 0; allowed: a whole number from 1"),
    ],
)
def test_a_search_of_nothing_is_refused(options, said):
    with pytest.raises(JointoptError, match=said):
        search(torch.ones(2, 4), torch.ones(3, 4), **options)


def test_zeros_stay_zeros():
    found = search(torch.zeros(2, 4), torch.zeros(3, 4), ratios=RATIOS)
    assert not found.held_weight(torch.zeros(2, 4)).any() and not found.held_input(torch.zeros(3, 4)).any()
