"""Laws of quantized weights, for every scheme: against float64, and against themselves."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import reference
from quant.errors import JointoptError
from quant.formats import SCHEMES, Format, Scheme, scheme
from quant.kernels import fake_quantize, quantize
from quant.reference import grouped_view
from quant.tensors import QuantizedTensor
from tests import exact
from tests.reread import reread

SHAPES = ((1, 128), (5, 256), (3, 64), (4, 8, 4, 4), (2, 32, 1, 1), (6, 1, 3, 3), (7, 3), (3, 1), (1, 1))
KINDS = ("normal", "zeros", "outlier", "tiny", "huge", "one sign", "zero rows", "spread")
# Those of bitsandbytes follow its kernels to the bit: tests/test_quant_bitsandbytes.py.
WEIGHTED = [name for name, each in SCHEMES.items() if each.weights is not None and not each.bitsandbytes]


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Weights of layers and convolutions, well behaved and not."""
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(KINDS))
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "outlier":
        weight.view(-1)[draw(st.integers(0, weight.numel() - 1))] = 1e4
    if kind == "zero rows":
        weight[::2] = 0
    if kind == "one sign":
        weight = weight.abs() + 1
    if kind == "spread":
        weight = weight * torch.exp2(torch.randint(-20, 20, shape, generator=generator))
    return weight * {"tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)


def fitted(name: str, weight: Tensor) -> Scheme | None:
    try:
        return scheme(name).fitted([weight[0].numel()])
    except JointoptError:
        return None


def every_scheme(law):
    """Checks a law, a function of (weight, its format), on random weights in every scheme that they can take."""

    @pytest.mark.parametrize("name", WEIGHTED)
    @given(weight=weights())
    @settings(max_examples=20, deadline=None)
    def test(name: str, weight: Tensor) -> None:
        wanted = fitted(name, weight)
        if wanted is not None:
            assert wanted.weights is not None
            law(weight, wanted.weights)

    test.__name__ = test.__qualname__ = law.__name__
    test.__doc__ = law.__doc__
    return test


def grouped(values: Tensor, format: Format) -> np.ndarray:
    """float64 [rows, scales a row, elements a scale]."""
    return grouped_view(values.flatten(1).double(), format).numpy()


def steps(quantized: QuantizedTensor) -> np.ndarray:
    """float64, to be divided by: [rows, scales a row, 1]."""
    scale = exact.as_float64(quantized.effective_scale())
    return scale[..., None] if scale.ndim == 2 else scale.reshape(1, 1, 1)


def zero_points(quantized: QuantizedTensor) -> np.ndarray:
    """float64, in the shape of `steps`, or broadcast to it."""
    if quantized.zero_point is None:
        return np.zeros((1, 1, 1))
    found = exact.as_float64(quantized.zero_point)
    return found[..., None] if found.ndim == 2 else found.reshape(1, 1, 1)


@every_scheme
def test_every_code_is_the_nearest_to_the_exact_quotient(weight, format):
    """But for what float32's division and addition may move a quotient that is next to a tie."""
    quantized = quantize(weight, format)
    quotient = grouped(weight, format) / steps(quantized) + zero_points(quantized)
    held = grouped(quantized_values(quantized), format)
    inside = np.clip(quotient, *exact.values(format.element)[[0, -1]])
    moved = 2.0**-22 * np.maximum(np.abs(inside), np.abs(zero_points(quantized)))
    assert (np.abs(held - inside) <= exact.distance(inside, format.element) + moved).all()


def quantized_values(quantized: QuantizedTensor) -> Tensor:
    """What the codes stand for, before scales and zero points, [rows, columns]."""
    if not quantized.format.kind.is_float:
        return quantized.codes.float()
    patterns = quantized.codes.numpy().view(exact.FLOATS[quantized.format.element])
    return torch.from_numpy(patterns.astype(np.float32))


@every_scheme
def test_dequantized_is_code_times_scale(weight, format):
    quantized = quantize(weight, format)
    held = grouped(quantized_values(quantized), format)
    expected = ((held - zero_points(quantized)) * steps(quantized)).astype(np.float32).reshape(weight.shape)
    assert np.array_equal(quantized.dequantize().numpy(), expected)
    assert torch.equal(quantized.dequantize(torch.bfloat16), torch.from_numpy(expected).bfloat16())


@every_scheme
def test_scales_are_the_exact_ones_as_they_are_stored(weight, format):
    quantized = quantize(weight, format)
    values = grouped(weight, format)
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    largest = np.maximum(-low, high)
    least, most = exact.values(format.element)[[0, -1]]
    scale = exact.as_float64(quantized.scale.float()).reshape(largest.shape)
    if format.scale == "e8m0":
        mantissa, exponent = np.frexp(largest)
        expected = np.where(largest > 0, exponent - 3 + (2 * mantissa >= 1.75) + 127, 0)
        assert np.array_equal(scale, np.clip(expected, 0, 254))
        return
    wanted = largest / ((most - least) / 2) if format.symmetric else (high - low) / (most - least)
    grid: type = ml_dtypes.bfloat16
    if format.scale == "e4m3":
        whole = exact.as_float64(quantized.global_scale).item()
        assert whole == pytest.approx(448 * 6 / largest.max() if largest.any() else 1.0, rel=1e-6)
        wanted, grid = np.minimum(wanted * whole, 448), ml_dtypes.float8_e4m3fn
    around = (wanted[..., None] * [1 - 1e-6, 1, 1 + 1e-6]).astype(np.float32).astype(grid).astype(np.float64)
    around = np.where(around == 0, 0.125 if format.scale == "e4m3" else 2.0**-7, around)
    assert (scale[..., None] == around).any(-1).all()
    if not format.symmetric:
        ideal = np.where(high > low, np.clip(least - low / scale, least, most), 0)
        assert (np.abs(exact.as_float64(quantized.zero_point) - ideal) <= 0.5 + 1e-5).all()


@every_scheme
def test_the_error_is_half_a_step_and_where_a_weight_saturates_what_lies_beyond(weight, format):
    quantized = quantize(weight, format)
    values, step = grouped(weight, format), steps(quantized)
    held = exact.values(format.element)
    low, high = ((end - zero_points(quantized)) * step for end in held[[0, -1]])
    beyond = np.maximum(np.maximum(low - values, values - high), 0)
    half = np.diff(held).max() / 2 * step
    error = np.abs(grouped(quantized.dequantize(), format) - values)
    assert (error <= beyond + half * (1 + 1e-5)).all()


@every_scheme
def test_quantizing_again_with_the_same_range_changes_no_code(weight, format):
    values = grouped_view(weight.flatten(1), format)
    clip = values.amin(-1), values.amax(-1)
    once = quantize(weight, format, clip)
    again = quantize(once.dequantize(), format, clip)
    assert torch.equal(again.scale.float(), once.scale.float())
    assert torch.equal(again.codes, once.codes)
    if format.scale == "e4m3":
        assert torch.allclose(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)
    else:
        assert torch.equal(again.dequantize(), once.dequantize())


@every_scheme
def test_a_larger_weight_never_gets_a_smaller_value_within_its_scale(weight, format):
    order = np.argsort(grouped(weight, format), axis=-1, kind="stable")
    held = np.take_along_axis(grouped(fake_quantize(weight, format), format), order, axis=-1)
    assert (np.diff(held) >= 0).all()


@every_scheme
def test_the_negative_of_a_weight_gets_the_negative_values(weight, format):
    """In symmetric formats; an integer's range has one more below, so that there the end may be a step apart."""
    if not format.symmetric:
        return
    plus, minus = quantize(weight, format), quantize(-weight, format)
    assert torch.equal(plus.scale.float(), minus.scale.float())
    if format.kind.is_float:
        assert torch.equal(plus.dequantize(), -minus.dequantize())
        return
    inside = (plus.codes < format.kind.max) & (minus.codes < format.kind.max)
    assert torch.equal(plus.codes[inside], -minus.codes[inside])
    assert (plus.codes.int() + minus.codes.int()).abs().max() <= 1


@pytest.mark.parametrize("name", WEIGHTED)
@given(seed=st.integers(0, 10**6), power=st.integers(-40, 40))
@settings(max_examples=10, deadline=None)
def test_a_power_of_two_passes_through(name, seed, power):
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed))
    wanted = scheme(name).fitted([128]).weights
    assert torch.equal(fake_quantize(weight * 2.0**power, wanted), fake_quantize(weight, wanted) * 2.0**power)


@pytest.mark.parametrize("name", [n for n in WEIGHTED if SCHEMES[n].weights.kind.is_float and n[:2] != "NV"])
@given(weight=weights())
@settings(max_examples=20, deadline=None)
def test_floating_point_formats_keep_what_they_have_already_rounded(name, weight):
    """The largest magnitude of each scale lands on the format's largest value again, or on the same power of two."""
    wanted = fitted(name, weight)
    if wanted is not None and weight.abs().max() < 1e20:
        once = fake_quantize(weight, wanted.weights)
        assert torch.equal(fake_quantize(once, wanted.weights), once)


@pytest.mark.parametrize("name", WEIGHTED)
@given(weight=weights())
@settings(max_examples=10, deadline=None)
def test_stored_and_read_again_is_the_same_to_the_bit(name, weight):
    wanted = fitted(name, weight)
    if wanted is None:
        return
    quantized = quantize(weight, wanted.weights)
    assert torch.equal(reread(quantized, wanted), quantized.dequantize())


SLICES = [(4, 64), (8, 128), (1, 128), (3, 192)]


@pytest.mark.parametrize("shape", [(8, 256), (8, 16, 4, 4), (8, 256, 1, 1)], ids=str)
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_slice_has_the_values_of_the_whole_and_where_scales_are_local_is_the_quantized_slice(name, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    wanted = scheme(name).fitted([64, 256]).weights
    whole = quantize(weight, wanted)
    for rows, columns in SLICES:
        channels = columns // weight[0, 0].numel()
        part = whole.sliced(rows, columns)
        assert part.shape == weight[:rows, :channels].shape
        assert torch.equal(part.dequantize(), whole.dequantize()[:rows, :channels])
        if wanted.granularity == "group" and wanted.scale != "e4m3":
            alone = quantize(weight[:rows, :channels], wanted)
            assert torch.equal(part.codes, alone.codes) and torch.equal(part.scale, alone.scale)
        if wanted.granularity == "channel":
            alone = quantize(weight[:rows], wanted)
            part = whole.sliced(rows, whole.codes.shape[1])
            assert torch.equal(part.codes, alone.codes) and torch.equal(part.scale, alone.scale)


def test_a_slice_that_splits_a_group_or_a_kernel_is_refused():
    weight = torch.randn(4, 16, 3, 3)
    with pytest.raises(JointoptError, match="50 columns splits a kernel of 9"):
        quantize(weight, SCHEMES["W8A8"].weights).sliced(4, 50)
    with pytest.raises(JointoptError, match="72 columns splits a group of 16"):
        quantize(weight, SCHEMES["NVFP4"].weights).sliced(4, 72)


@pytest.mark.parametrize("name", WEIGHTED)
def test_zeros_stay_zeros_and_their_scales_are_not(name):
    weight = torch.zeros(4, 128)
    quantized = quantize(weight, scheme(name).fitted([128]).weights)
    assert torch.equal(quantized.dequantize(), weight)
    assert (quantized.effective_scale() > 0).all()


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("smallest", [1e-45, 1e-41, 1e-38])
def test_weights_too_small_for_their_scale_become_zero_or_stay_near(name, smallest):
    weight = torch.linspace(-1, 1, 256).reshape(2, 128) * smallest
    held = fake_quantize(weight, scheme(name).fitted([128]).weights)
    assert held.isfinite().all()
    assert (held.abs() <= 1.51 * weight.abs().max()).all()


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_near_the_end_of_their_dtype_saturate(name, dtype):
    end = torch.finfo(dtype).max
    weight = torch.linspace(-1, 1, 256, dtype=torch.float64).mul(end).reshape(2, 128).to(dtype)
    wanted = scheme(name).fitted([128]).weights
    held, plain = fake_quantize(weight, wanted), reference.fake_quantize(weight, wanted)
    assert torch.equal(held, plain)
    assert held.isfinite().all()
    most = min(1e38, end)
    kept = weight.double().clamp(-most, most)
    assert ((held.double() - kept).abs() <= 0.35 * kept.abs().max()).all()


def test_nvfp4_groups_far_below_the_largest_become_zero():
    weight = torch.full((1, 32), 1e-6)
    weight[0, :16] = 1000.0
    held = fake_quantize(weight, SCHEMES["NVFP4"].weights)
    assert torch.allclose(held[0, :16], weight[0, :16], rtol=1e-6, atol=0)
    assert not held[0, 16:].any()


def test_codes_do_not_depend_on_strides_dtype_or_gradients():
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in WEIGHTED:
        wanted = scheme(name).fitted([256]).weights
        expected = quantize(weight.T.contiguous().float(), wanted)
        for same in (weight.T, weight.T.double(), torch.nn.Parameter(weight.T.float())):
            found = quantize(same, wanted)
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale.float(), expected.scale.float())
            assert not found.scale.requires_grad


def test_int8_per_tensor_asymmetric_holds_both_ends():
    weight = torch.tensor([[0.0, 1.0, 2.0, 25.5]])
    per_tensor = Format("int8", "tensor", symmetric=False)
    quantized = quantize(weight, per_tensor)
    assert quantized.codes.tolist() == [[-128, -118, -108, 127]]
    assert quantized.zero_point.tolist() == [-128]
    assert replace(quantized, codes=quantized.codes[:, :1], shape=(1, 1)).dequantize().item() == 0
