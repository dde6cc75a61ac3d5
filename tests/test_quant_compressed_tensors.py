"""Scales, zero points and fake quantization equal those of compressed-tensors, for each of its presets, to the bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from torch import Tensor, nn

from quant.calibration import ActivationObserver
from quant.formats import SCHEMES, Format, scheme
from quant.kernels import fake_quantize_activation, quantize

PRESETS = [name for name in SCHEMES if name in PRESET_SCHEMES]
ACTIVATIONS = [name for name in PRESETS if SCHEMES[name].activations is not None]
DTYPES = (torch.float32, torch.bfloat16)


def test_these_are_the_presets():
    named = "W8A8 W8A16 W4A16 W4A16_ASYM W4A8 W4A4 FP8 FP8_DYNAMIC NVFP4 NVFP4A16 MXFP4 MXFP4A16"
    assert set(PRESETS) == set(named.split())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small ones and large ones, a row of zeros, a row all of one sign."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-8, 8, (*shape[:-1], 1), generator=generator)
    )
    rows = found.view(-1, shape[-1])
    rows[1] = 0
    rows[2] = rows[2].abs()
    return found


def theirs(name: str, part: str) -> QuantizationArgs:
    return getattr(preset_name_to_scheme(name, ["Linear"]), part)


def ends(weight: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    if arguments.strategy == "tensor":
        return weight.amin(), weight.amax()
    if arguments.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    grouped = weight.unflatten(1, (-1, arguments.group_size))
    return grouped.amin(-1), grouped.amax(-1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_the_same_of_weights_and_activations(name):
    wanted = scheme(name).fitted([256])
    for format, part in ((wanted.weights, "weights"), (wanted.activations, "input_activations")):
        arguments = theirs(name, part)
        assert (format is None) == (arguments is None)
        if format is not None:
            assert (arguments.num_bits, arguments.type == "float") == (format.bits, format.kind.is_float)
            assert (arguments.symmetric, arguments.group_size) == (format.symmetric, format.group_size)
            assert arguments.strategy == ("tensor_group" if format.scale == "e4m3" else format.granularity)
            assert bool(arguments.dynamic) == format.dynamic


@pytest.mark.parametrize("name", PRESETS)
def test_weights_have_their_scales_and_their_values(name):
    """Theirs in float32, then rounded to what is stored: bfloat16 where the preset names no type of its own."""
    arguments, weight = theirs(name, "weights"), numbers(16, 256)
    quantized = quantize(weight, scheme(name).fitted([256]).weights)
    whole = generate_gparam(*weight.aminmax()) if arguments.strategy == "tensor_group" else None
    scale, zero_point = calculate_qparams(*ends(weight, arguments), arguments, global_scale=whole)
    if whole is not None:
        assert torch.equal(quantized.global_scale, whole)
        assert torch.equal(quantized.scale.float(), scale)
    elif arguments.scale_dtype is None:
        rounded = scale.bfloat16().float()
        rounded[scale == torch.finfo(torch.float32).eps] = torch.finfo(torch.bfloat16).eps
        assert torch.equal(quantized.scale.float(), rounded)
    else:
        exponents = (127 + torch.log2(scale)).to(torch.uint8)
        assert torch.equal(quantized.scale, exponents)
    held = quantized.scale.float() if whole is not None else quantized.effective_scale()
    point = quantized.zero_point
    assert torch.equal(quantized.dequantize(), their_fake_quantize(weight, held, point, arguments, whole))
    if point is not None:
        assert (point.int() - zero_point.int()).abs().max() <= 1, "theirs are by the scale before it is rounded"


def test_a_weight_whose_scales_bfloat16_holds_has_their_zero_points():
    arguments = theirs("W4A16_ASYM", "weights")
    weight = torch.rand(16, 256, generator=torch.Generator().manual_seed(0))
    grouped = weight.view(16, 2, 128)
    grouped -= torch.linspace(0, 1, 32).view(16, 2, 1)
    grouped[..., 0] = torch.minimum(grouped.amin(-1), torch.zeros(()))
    grouped[..., 1] = grouped[..., 0] + 15 * 2.0**-3
    scale, zero_point = calculate_qparams(*ends(weight, arguments), arguments)
    quantized = quantize(weight, scheme("W4A16_ASYM_G128").weights)
    close = (scale - 2.0**-3).abs() < 1e-7
    assert close.all() and (quantized.scale == 2.0**-3).all()
    assert torch.equal(quantized.zero_point, zero_point)


def dynamically(x: Tensor, arguments: QuantizationArgs, whole: Tensor | None = None) -> Tensor:
    scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, nn.Module(), whole)
    return their_fake_quantize(x, scale, zero_point, arguments, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if SCHEMES[n].activations.dynamic])
def test_dynamic_activations_have_their_values(name, dtype):
    x, whole = numbers(3, 7, 256).to(dtype), None
    if name == "NVFP4":
        observer = ActivationObserver(SCHEMES[name].activations)
        observer.observe(x)
        whole = observer.constants()["input_global_scale"]
        assert torch.equal(whole, generate_gparam(*x.float().aminmax()))
    held = fake_quantize_activation(x, SCHEMES[name].activations, global_scale=whole)
    assert held.dtype == dtype
    assert torch.equal(held, dynamically(x, theirs(name, "input_activations"), whole).to(dtype))


def test_nvfp4_activations_beyond_what_calibration_saw_saturate():
    x = numbers(3, 7, 256)
    whole = generate_gparam(*(x / 8).aminmax())
    held = fake_quantize_activation(x, SCHEMES["NVFP4"].activations, global_scale=whole)
    assert held.abs().max() == pytest.approx(x.abs().max().item() / 8)
    assert torch.equal(held, dynamically(x, theirs("NVFP4", "input_activations"), whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("element", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize(("granularity", "group"), [("token", None), ("group", 32), ("tensor", None)])
def test_dynamic_integers_of_any_granularity_have_their_values(granularity, group, element, bits, symmetric, dtype):
    x = numbers(3, 7, 256, seed=1).to(dtype)
    arguments = QuantizationArgs(
        num_bits=bits, type="int", strategy=granularity, group_size=group, symmetric=symmetric, dynamic=True
    )
    ours = Format(element, granularity, group, symmetric, dynamic=True)
    assert torch.equal(fake_quantize_activation(x, ours), dynamically(x, arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_e4m3_scales_of_any_granularity_stay_float32_once_divided_by_that_of_the_tensor(granularity, dtype):
    x = numbers(3, 7, 256, seed=2).to(dtype)
    whole = generate_gparam(*x.float().aminmax())
    arguments = QuantizationArgs(
        num_bits=8, type="float", strategy=granularity, dynamic=True, scale_dtype=torch.float8_e4m3fn
    )
    ours = Format("fp8_e4m3", granularity, scale="e4m3", dynamic=True)
    held = fake_quantize_activation(x, ours, global_scale=whole)
    assert torch.equal(held, dynamically(x, arguments, whole).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("element", "symmetric"), [("int8", True), ("int8", False), ("fp8_e4m3", True)])
def test_static_activations_have_their_values_and_scales(element, symmetric, dtype):
    ours = Format(element, "tensor", symmetric=symmetric)
    kind = "float" if ours.kind.is_float else "int"
    arguments = QuantizationArgs(num_bits=8, type=kind, strategy="tensor", symmetric=symmetric)
    x = numbers(3, 7, 256, seed=2).to(dtype)
    observer = ActivationObserver(ours)
    observer.observe(x)
    constants = observer.constants()
    scale, zero_point = constants["input_scale"], constants.get("input_zero_point")
    expected, expected_point = calculate_qparams(*x.float().aminmax(), arguments)
    assert torch.equal(scale, expected.bfloat16())
    assert zero_point is None or (zero_point.int() - expected_point.int()).abs() <= 1
    held = fake_quantize_activation(x * 1.5, ours, scale, zero_point)
    assert torch.equal(held, their_fake_quantize(x * 1.5, scale.to(dtype), zero_point, arguments))


def test_the_gradient_of_an_activation_goes_straight_through():
    x = numbers(2, 3, 64).requires_grad_()
    fake_quantize_activation(x, SCHEMES["W8A8"].activations).mul(torch.arange(64.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(64.0).expand(2, 3, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zeros_pass_every_activation_format(name, dtype):
    format, x = SCHEMES[name].activations, torch.zeros(2, 3, 64, dtype=dtype)
    observer = ActivationObserver(format)
    observer.observe(x)
    constants = observer.constants() if SCHEMES[name].needs_constants else {}
    held = fake_quantize_activation(x, format, constants.get("input_scale"), None, constants.get("input_global_scale"))
    assert torch.equal(held, x)


@pytest.mark.parametrize("name", ["W8A8", "W8A8_ASYM", "FP8_DYNAMIC", "FP8_E5M2"])
def test_a_token_of_a_convolutions_input_is_one_sample(name):
    """So that what is in a batch beside it changes nothing."""
    format = SCHEMES[name].activations
    x = numbers(4, 3, 5, 8)
    alone = torch.stack([fake_quantize_activation(one.reshape(1, -1), format).view_as(one) for one in x])
    assert torch.equal(fake_quantize_activation(x, format), alone)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_a_group_of_a_convolutions_input_is_of_neighbouring_channels(name):
    format, x = SCHEMES[name].activations, numbers(2, 64, 3, 3)
    whole = generate_gparam(*x.aminmax()) if name == "NVFP4" else None
    last = x.permute(0, 2, 3, 1).contiguous()
    expected = fake_quantize_activation(last.view(-1, 64), format, global_scale=whole).view_as(last)
    assert torch.equal(fake_quantize_activation(x, format, global_scale=whole), expected.permute(0, 3, 1, 2))
