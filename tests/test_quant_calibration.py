"""Clipping ranges against brute force in float64, and observers of activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.calibration import (
    ACTIVATION_METHODS,
    WEIGHT_METHODS,
    ActivationObserver,
    Histogram,
    choose_clip,
    static_constants,
)
from quant.errors import JointoptError
from quant.formats import SCHEMES, Format, scheme
from quant.kernels import fake_quantize, fake_quantize_activation
from quant.reference import NVFP4_GLOBAL_RANGE
from tests import exact

FORMATS = {
    "int8 tensor": Format("int8", "tensor"),
    "int8 channel": Format("int8", "channel"),
    "int4 groups": Format("int4", "group", 32),
    "int4 groups, asymmetric": Format("int4", "group", 32, symmetric=False),
    "fp8 channel": Format("fp8_e4m3", "channel"),
    "fp4 groups": Format("fp4_e2m1", "group", 32),
    "nvfp4": SCHEMES["NVFP4"].weights,
    "mxfp4": SCHEMES["MXFP4"].weights,
}


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3


def scales_of(matrix: Tensor, format: Format) -> list[list[np.ndarray]]:
    """For each row, the float64 values that share each scale; for one scale a tensor, one row of one."""
    rows = exact.as_float64(matrix)
    if format.granularity == "tensor":
        return [[rows.flatten()]]
    if format.granularity == "channel":
        return [[row] for row in rows]
    return [np.split(row, len(row) // format.group_size) for row in rows]


def squared_error(values: np.ndarray, low: float, high: float, format: Format, largest: float) -> float:
    """Of one scale's values rounded into a range, in float64 but for how the scale is stored."""
    least, most = exact.values(format.element)[[0, -1]]
    low, high = min(low, 0.0), max(high, 0.0)
    reach, point, whole = max(-low, high), 0.0, 1.0
    if format.scale == "e8m0":
        mantissa, exponent = np.frexp(reach)
        step = 2.0 ** (exponent - 3 + (2 * mantissa >= 1.75))
    elif format.scale == "e4m3":
        whole = float(np.float32(NVFP4_GLOBAL_RANGE) / np.float32(largest))
        held = exact.nearest(np.array([reach / 6 * whole]), "fp8_e4m3")[0]
        step = (held or 0.125) / whole
    else:
        wanted = reach / ((most - least) / 2) if format.symmetric else (high - low) / (most - least)
        step = float(torch.tensor(wanted, dtype=torch.float32).bfloat16())
    if not format.symmetric:
        point = float(np.clip(np.round(least - low / step), least, most))
    held = (exact.nearest(values / step + point, format.element) - point) * step
    return float(((held - values) ** 2).sum())


def each_error(matrix: Tensor, held: Tensor, format: Format) -> list[float]:
    pairs = zip(scales_of(matrix, format), scales_of(held, format), strict=True)
    return [((a - b) ** 2).sum() for x, y in pairs for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_minmax_is_the_range_of_each_scale(name):
    weight, format = heavy_tailed(4, 96, seed=0), FORMATS[name]
    low, high = choose_clip(weight, format)
    expected = scales_of(weight, format)
    assert low.tolist() == [[part.min() for part in row] for row in expected]
    assert high.tolist() == [[part.max() for part in row] for row in expected]


@pytest.mark.parametrize("name", FORMATS)
def test_percentile_is_the_thousandth_from_either_end(name):
    weight, format = heavy_tailed(4, 4096, seed=1), FORMATS[name]
    low, high = choose_clip(weight, format, "percentile")
    expected = scales_of(weight, format)
    assert np.allclose(low, [[np.quantile(part, 0.001) for part in row] for row in expected], rtol=1e-5)
    assert np.allclose(high, [[np.quantile(part, 0.999) for part in row] for row in expected], rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_mse_finds_the_fraction_that_brute_force_finds(name, seed):
    """Or one whose error is the same but for float32's rounding."""
    weight, format = heavy_tailed(2, 64, seed), FORMATS[name]
    low, high = choose_clip(weight, format, "mse")
    largest = float(weight.abs().max())
    flat = [part for row in scales_of(weight, format) for part in row]
    for values, least, most in zip(flat, low.flatten().tolist(), high.flatten().tolist(), strict=True):
        tried = [
            squared_error(values, values.min() * f, values.max() * f, format, largest) for f in np.linspace(1, 0.5, 26)
        ]
        assert squared_error(values, least, most, format, largest) <= min(tried) * (1 + 1e-3)


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0, 6]))
@settings(max_examples=8, deadline=None)
def test_mse_is_never_worse_than_minmax_in_any_scale(name, seed, spread):
    format = FORMATS[name]
    weight = heavy_tailed(3, 96, seed) * torch.exp2(torch.linspace(-spread, spread, 96))
    errors = {
        method: np.array(each_error(weight, fake_quantize(weight, format, choose_clip(weight, format, method)), format))
        for method in ("minmax", "mse")
    }
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_mse_counts_each_error_as_its_importance_says(name):
    weight, format = heavy_tailed(4, 96, seed=5), FORMATS[name]
    importance = torch.ones(1, 96)
    importance[:, ::3] = 1e4
    errors = [
        ((fake_quantize(weight, format, choose_clip(weight, format, "mse", counted)) - weight) ** 2 * importance).sum()
        for counted in (importance, None)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["int4 groups", "int4 groups, asymmetric", "fp4 groups", "nvfp4", "mxfp4"])
def test_mse_is_better_on_four_bits_and_outliers(name):
    weight, format = heavy_tailed(8, 256, seed=3), FORMATS[name]
    minmax, mse = (
        (fake_quantize(weight, format, choose_clip(weight, format, method)) - weight).square().sum()
        for method in ("minmax", "mse")
    )
    assert mse < minmax


@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_method_takes_convolutions_and_zeros_and_single_rows(name, method):
    for weight in (torch.randn(4, 8, 4, 4), torch.zeros(2, 32), torch.ones(1, 32)):
        low, high = choose_clip(weight, FORMATS[name], method)
        assert (low <= high).all()
        held = fake_quantize(weight, FORMATS[name], (low, high))
        assert held.shape == weight.shape and held.isfinite().all()
        assert held.any() == weight.any()


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_a_groups_clip_does_not_depend_on_the_columns_beside_it(method):
    """So that a slice of a calibrated weight is the calibrated slice."""
    weight = heavy_tailed(4, 128, seed=4)
    for format in (FORMATS["int4 groups"], FORMATS["int4 groups, asymmetric"], FORMATS["mxfp4"]):
        whole, part = choose_clip(weight, format, method), choose_clip(weight[:2, :64], format, method)
        assert all(torch.equal(a[:2, :2], b) for a, b in zip(whole, part, strict=True))


STATIC = {
    "symmetric": Format("int8", "tensor"),
    "asymmetric": Format("int8", "tensor", symmetric=False),
    "fp8": Format("fp8_e4m3", "tensor"),
    "nvfp4": SCHEMES["NVFP4"].activations,
}


def observed(format: Format, *batches: Tensor, method: str = "minmax") -> dict[str, Tensor]:
    observer = ActivationObserver(format, method)
    for batch in batches:
        observer.observe(batch)
    return observer.constants()


@pytest.mark.parametrize("method", [method for method in ACTIVATION_METHODS if method != "average"])
@pytest.mark.parametrize("name", STATIC)
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 5), shift=st.sampled_from([0.0, 4.0, -4.0]))
@settings(max_examples=4, deadline=None)
def test_batch_by_batch_is_all_at_once(name, method, seed, parts, shift):
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed)) ** 3 + shift
    pieces = [*x.chunk(parts), torch.empty(0, 8), torch.zeros(0)]
    once, parted = observed(STATIC[name], x, method=method), observed(STATIC[name], *pieces, method=method)
    assert once.keys() == parted.keys()
    assert all(torch.equal(once[key], parted[key]) for key in once)


@pytest.mark.parametrize("shift", [0.0, 4.0, -4.0])
def test_the_constants_hold_the_range_that_was_seen(shift):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + shift
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    symmetric = observed(STATIC["symmetric"], x)
    assert symmetric["input_scale"].item() == pytest.approx(max(-low, high) / 127.5, rel=2**-8)
    asymmetric = observed(STATIC["asymmetric"], x)
    scale, point = asymmetric["input_scale"].item(), asymmetric["input_zero_point"].item()
    assert scale == pytest.approx((high - low) / 255, rel=2**-8)
    assert (-128 - point) * scale == pytest.approx(low, abs=1.01 * scale)
    assert (127 - point) * scale == pytest.approx(high, abs=1.01 * scale)
    assert observed(STATIC["fp8"], x)["input_scale"].item() == pytest.approx(max(-low, high) / 448, rel=2**-8)
    assert observed(STATIC["nvfp4"], x)["input_global_scale"].item() == pytest.approx(2688 / max(-low, high))
    assert asymmetric["input_zero_point"].dtype == torch.int8 and asymmetric["input_scale"].dtype == torch.bfloat16
    assert all(len(value) == 1 for value in asymmetric.values())


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_inputs_that_are_not_finite_are_refused(name, bad):
    observer = ActivationObserver(STATIC[name])
    observer.observe(torch.tensor([1.0, bad, 2.0]))
    observer.observe(torch.ones(3))
    with pytest.raises(JointoptError, match="saw inputs that are not finite"):
        observer.constants()


@pytest.mark.parametrize("name", STATIC)
def test_no_input_at_all_is_refused(name):
    for batches in ([], [torch.empty(0, 4)]):
        with pytest.raises(JointoptError, match="calibration saw no input"):
            observed(STATIC[name], *batches)


def test_the_largest_finite_inputs_are_not_taken_for_infinite():
    most = torch.finfo(torch.float32).max
    constants = observed(STATIC["symmetric"], torch.tensor([-most, most]))
    assert constants["input_scale"].isfinite().all()


@given(seed=st.integers(0, 10**6), power=st.integers(-40, 40))
@settings(max_examples=20, deadline=None)
def test_a_histogram_counts_each_value_in_its_bin_in_any_order(seed, power):
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) ** 5 * 2.0**power
    whole, parts = Histogram(), Histogram()
    whole.add(x)
    for part in x.flip(0).split(7):
        parts.add(part)
    assert whole.reach == parts.reach > float(x.abs().max()) and torch.equal(whole.counts, parts.counts)
    width = 2 * whole.reach / len(whole.counts)
    at = (x.double() / width).floor().long() + len(whole.counts) // 2
    assert torch.equal(whole.counts, torch.bincount(at, minlength=len(whole.counts)))
    assert (whole.centres()[at] - x).abs().max() <= width / 2 * (1 + 1e-9)


def test_a_histogram_that_begins_with_zeros_is_as_fine_as_one_that_ends_with_them():
    x, zeros = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1e-3, torch.zeros(50)
    first, last = Histogram(), Histogram()
    for histogram, parts in ((first, (zeros, x)), (last, (x, zeros))):
        for part in parts:
            histogram.add(part)
    assert first.reach == last.reach and torch.equal(first.counts, last.counts)


def lost(x: Tensor, constants: dict[str, Tensor], format: Format) -> float:
    arguments = {name.removeprefix("input_"): value for name, value in constants.items()}
    return float((fake_quantize_activation(x, format, **arguments) - x).square().mean())


@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
@given(seed=st.integers(0, 10**6), outlier=st.sampled_from([20.0, 100.0]))
@settings(max_examples=10, deadline=None)
def test_least_squared_error_is_no_more_than_that_of_the_whole_range(name, seed, outlier):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    x[0] = outlier
    form = STATIC[name]
    errors = {method: lost(x, observed(form, x, method=method), form) for method in ("minmax", "mse")}
    assert errors["mse"] <= errors["minmax"] * 1.02  # over a histogram


@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "fp8"])
def test_least_squared_error_of_inputs_is_that_of_the_share_that_brute_force_finds(name):
    x, form = torch.randn(20_000, generator=torch.Generator().manual_seed(0)), STATIC[name]
    x[:20] *= 15
    tried = [
        lost(x, static_constants((x.min().clamp(min=-end), x.max().clamp(max=end)), form), form)
        for end in x.abs().max() * torch.linspace(0.02, 1, 50)
    ]
    assert lost(x, observed(form, x, method="mse"), form) <= min(tried) * 1.02  # over a histogram


def test_a_percentile_leaves_out_as_much_at_either_end():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    expected = np.quantile(x.double(), [1e-4, 1 - 1e-4])
    for outlier in (-300.0, 300.0):
        x[0] = outlier
        observer = ActivationObserver(STATIC["asymmetric"], "percentile")
        observer.observe(x)
        assert np.allclose([float(end) for end in observer._range()], expected, atol=0.4)


def with_an_outlier() -> Tensor:
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    x[0] = 300.0
    return x


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "percentile") for name in ("symmetric", "asymmetric", "fp8")),
        *((name, "entropy") for name in ("symmetric", "asymmetric")),
    ],
)
def test_one_outlier_in_many_does_not_set_the_range(name, method):
    x, form = with_an_outlier(), STATIC[name]
    whole, clipped = observed(form, x)["input_scale"], observed(form, x, method=method)["input_scale"]
    assert clipped < 0.2 * whole
    held = clipped.float() * (form.kind.max if form.symmetric else 255)
    assert held > 2 * x[1:].std()


def test_of_floating_point_the_range_of_least_divergence_holds_an_outlier_which_costs_the_others_nothing():
    x, form = with_an_outlier(), STATIC["fp8"]
    whole, clipped = observed(form, x, method="entropy"), observed(form, x, method="percentile")
    assert torch.equal(whole["input_scale"], observed(form, x)["input_scale"])
    others = [fake_quantize_activation(x, form, each["input_scale"])[1:] - x[1:] for each in (whole, clipped)]
    assert others[0].square().mean() < 1.02 * others[1].square().mean()


@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("zeros", ["of a ReLU", "before a negated ReLU", "of dropped values"])
def test_exact_zeros_leave_the_range_of_least_divergence_where_the_others_have_it(zeros, name):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    if zeros == "of dropped values":
        x[2500:] = 0
    else:
        x = x.relu() if zeros == "of a ReLU" else -x.relu()
    with_zeros, without = (observed(STATIC[name], each, method="entropy") for each in (x, x[x != 0]))
    assert all(torch.equal(with_zeros[key], without[key]) for key in without)


@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "fp8"])
@pytest.mark.parametrize("levels", [(0.0, 1.0), (-1.0, 1.0), (0.0, 1 / 3, 2 / 3, 1.0), (3.0,)], ids=str)
def test_few_levels_keep_their_largest_in_the_range_of_least_divergence(name, levels):
    x, form = torch.tensor(levels * 500), STATIC[name]
    whole, found = observed(form, x), observed(form, x, method="entropy")
    assert whole.keys() == found.keys() and all(torch.equal(whole[key], found[key]) for key in whole)


def test_the_moving_average_follows_the_batches():
    x = [torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 2.0]), torch.tensor([-3.0, 2.0])]
    observer = ActivationObserver(STATIC["symmetric"], "average")
    for each in x:
        observer.observe(each)
    low, high = -1 + 0.1 * (-3 + 1), 1 + 0.1 * (2 - 1)
    assert observer._range() == (pytest.approx(low + 0.1 * (-3 - low)), pytest.approx(high + 0.1 * (2 - high)))


def test_memory_does_not_grow_with_the_batches():
    observer = ActivationObserver(STATIC["symmetric"], "entropy")
    for seed in range(20):
        observer.observe(torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2.0**seed)
    held = [value for value in vars(observer.histogram).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in held) == 4096 and int(observer.histogram.counts.sum()) == 1000


def test_inputs_of_zeros_alone_have_constants_by_every_method():
    for method in ACTIVATION_METHODS:
        assert observed(STATIC["symmetric"], torch.zeros(5), method=method)["input_scale"].isfinite().all()


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(JointoptError, match="'entrophy'; did you mean 'entropy'.*; allowed: minmax, average"):
        ActivationObserver(STATIC["symmetric"], "entrophy")


def test_a_scheme_says_whether_it_needs_constants():
    needing = {name for name, each in SCHEMES.items() if each.needs_constants}
    assert needing == {"W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8", "NVFP4"}
    assert not scheme("MXFP4").needs_constants


def test_a_range_has_no_gradient_of_the_weight_that_it_was_chosen_from():
    weight = torch.randn(4, 8, requires_grad=True)
    for method in ("minmax", "percentile", "mse"):
        assert not any(end.requires_grad for end in choose_clip(weight, Format("int8", "channel"), method))
