"""Rounding into number formats: every code, every halfway point, every number of 16 bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.formats import ELEMENTS, Format
from quant.reference import e8m0_exponent, round_to_format
from quant.tensors import QuantizedTensor, code_values, value_codes
from tests import exact

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TORCH_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal to the bit, signs of zero included."""
    return torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def neighbours(points: Tensor) -> Tensor:
    up, down = (torch.full_like(points, end) for end in (torch.inf, -torch.inf))
    return torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down)])


def every_16_bit_number(dtype: torch.dtype) -> Tensor:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = patterns.view(dtype)
    return numbers[~numbers.isnan()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", exact.ELEMENTS)
def test_every_value_stays_and_every_halfway_point_goes_to_the_even_neighbour(element, dtype):
    held = torch.from_numpy(exact.values(element)).to(dtype)
    assert torch.equal(round_to_format(held, element), held)
    halves = torch.from_numpy(exact.halfways(element)).to(dtype)
    assert np.array_equal(exact.as_float64(halves), exact.halfways(element)), "the halfway points are exact in dtype"
    points = neighbours(torch.cat([held, halves]))
    points = points[points.isfinite()]
    expected = exact.nearest(exact.as_float64(points), element)
    assert np.array_equal(exact.as_float64(round_to_format(points, element)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("element", exact.ELEMENTS)
def test_every_number_of_16_bits_rounds_as_the_exact_search_says(element, dtype):
    numbers = every_16_bit_number(dtype)
    expected = torch.from_numpy(exact.nearest(exact.as_float64(numbers), element)).to(dtype)
    assert torch.equal(round_to_format(numbers, element), expected)


@pytest.mark.parametrize("element", exact.FLOATS)
def test_every_number_of_16_bits_casts_as_ml_dtypes_does(element):
    numbers = every_16_bit_number(torch.bfloat16)
    end = float(exact.values(element)[-1])
    within = numbers.clamp(-end, end).float().numpy()
    expected = torch.from_numpy(within.astype(exact.FLOATS[element]).astype(np.float32)).bfloat16()
    assert same(round_to_format(numbers, element), expected)


@pytest.mark.parametrize("element", TORCH_FLOATS)
def test_every_number_of_16_bits_casts_as_torch_does(element):
    numbers = every_16_bit_number(torch.bfloat16)
    end = torch.finfo(TORCH_FLOATS[element]).max
    expected = numbers.clamp(-end, end).to(TORCH_FLOATS[element]).to(torch.bfloat16)
    assert same(round_to_format(numbers, element), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("element", exact.ELEMENTS)
@given(numbers=st.lists(st.floats(allow_nan=False), min_size=1, max_size=50))
@settings(max_examples=30, deadline=None)
def test_any_number_rounds_as_the_exact_search_says(element, dtype, numbers):
    numbers = torch.tensor(numbers, dtype=dtype)
    expected = exact.nearest(exact.as_float64(numbers), element)
    assert np.array_equal(exact.as_float64(round_to_format(numbers, element)), expected)


def test_float64_is_rounded_once_where_a_stop_at_float32_would_make_a_tie():
    """1.1875 lies halfway between 1.125 and 1.25; the next float64 below it is nearer to 1.125."""
    below = torch.tensor([1.1875], dtype=torch.float64).nextafter(torch.zeros(1, dtype=torch.float64))
    assert below.float().item() == 1.1875
    assert round_to_format(below, "fp8_e4m3").item() == 1.125
    assert below.to(torch.float8_e4m3fn).double().item() == 1.25, "which is what torch's cast does"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", exact.ELEMENTS)
def test_infinities_saturate_nan_stays_and_zeros_keep_their_sign(element, dtype):
    rounded = round_to_format(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0], dtype=dtype), element)
    assert rounded[:2].tolist() == [ELEMENTS[element].max, ELEMENTS[element].min]
    assert rounded[2].isnan()
    assert rounded[3:].tolist() == [0, 0] and rounded[3:].signbit().tolist() == [False, True]
    assert rounded.dtype == dtype


@pytest.mark.parametrize("element", exact.ELEMENTS)
def test_views_and_empty_tensors_and_shapes(element):
    whole = torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0)) * 5
    for view in (whole.transpose(0, 2), whole[::2, 1:, ::3], whole[0, 0].expand(4, 10), whole[..., 0]):
        assert torch.equal(round_to_format(view, element), round_to_format(view.contiguous(), element))
    assert round_to_format(torch.empty(0, 3), element).shape == (0, 3)
    assert round_to_format(torch.tensor(0.3), element).shape == ()


def test_the_input_is_left_as_it_was():
    numbers = torch.tensor([0.3, 500.0])
    round_to_format(numbers, "fp4_e2m1")
    assert numbers.tolist() == torch.tensor([0.3, 500.0]).tolist()


@pytest.mark.parametrize("element", exact.FLOATS)
def test_every_bit_pattern_stands_for_what_ml_dtypes_says(element):
    patterns = exact.codes(element)
    expected = patterns.view(exact.FLOATS[element]).astype(np.float32)
    found = code_values(torch.from_numpy(patterns), ELEMENTS[element]).numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    finite = np.isfinite(expected)
    back = value_codes(torch.from_numpy(expected[finite]), ELEMENTS[element])
    assert np.array_equal(back.numpy(), patterns[finite])


@pytest.mark.parametrize("element", exact.INTEGERS)
def test_every_integer_is_its_own_code(element):
    held = torch.from_numpy(exact.values(element)).float()
    found = value_codes(held, ELEMENTS[element])
    assert found.dtype == torch.int8
    assert torch.equal(code_values(found, ELEMENTS[element]), held)


def test_every_e8m0_scale_is_what_ml_dtypes_says():
    patterns = np.arange(255, dtype=np.uint8)
    expected = patterns.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    held = Format("fp4_e2m1", "group", 32, scale="e8m0")
    nothing = torch.empty(0, dtype=torch.uint8)
    scale = QuantizedTensor(nothing, torch.from_numpy(patterns), None, None, held, (0,)).effective_scale()
    assert np.array_equal(exact.as_float64(scale), expected)
    assert torch.equal(scale, torch.from_numpy(patterns).view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize(
    ("element", "largest"), [("fp4_e2m1", 2), ("fp8_e4m3", 8), ("fp8_e5m2", 15), ("int8", 6), ("int4", 2)]
)
def test_the_mx_exponent_of_every_magnitude_at_and_around_its_thresholds(element, largest):
    """floor(log2) less the element's own, from a mantissa of 1.75 on one more, where e2m1 would round 6 to 8."""
    kind = ELEMENTS[element]
    powers = torch.exp2(torch.arange(-120, 127, dtype=torch.float64))
    starts = torch.cat([powers, powers * 1.75])
    points = neighbours(starts.float())
    mantissa, exponent = np.frexp(exact.as_float64(points))
    expected = np.clip(exponent - 1 - largest + (2 * mantissa >= 1.75) + 127, 0, 254)
    assert np.array_equal(e8m0_exponent(points, kind).numpy(), expected)
    assert e8m0_exponent(torch.tensor([0.0, 1e-45, 2.0**-126]), kind).tolist() == [0, 0, 0]
    assert e8m0_exponent(torch.tensor([torch.finfo(torch.float32).max]), kind).tolist() == [255 - largest]
