"""The kernels compute what the reference computes, to the bit: every format, granularity, dtype and odd tensor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import kernels, reference
from quant.calibration import choose_clip
from quant.errors import JointoptError
from quant.formats import ELEMENTS, Format, scheme
from quant.kernels import cpu, quantize
from tests import exact
from tests.same import same, same_codes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [
    (element, symmetric) for element in exact.ELEMENTS for symmetric in (True, False) if symmetric or "int" in element
]
BLOCKS = [
    Format("fp4_e2m1", "group", 16, scale="e4m3", dynamic=True),
    Format("fp4_e2m1", "group", 32, scale="e8m0", dynamic=True),
    Format("fp8_e4m3", "group", 32, scale="e8m0", dynamic=True),
    Format("int8", "group", 32, scale="e8m0", dynamic=True),
    Format("int4", "group", 16, scale="e4m3", dynamic=True),
    Format("fp8_e5m2", "group", 16, scale="e4m3", dynamic=True),
]
DYNAMIC = [
    Format(element, granularity, group, symmetric, dynamic=True)
    for element, symmetric in KINDS
    for granularity, group in (("tensor", None), ("token", None), ("channel", None), ("group", 16), ("group", 48))
] + BLOCKS
STATIC = [Format(element, "tensor", None, symmetric) for element, symmetric in KINDS]
WEIGHTS = [format for format in DYNAMIC if format.granularity != "token"]
BITSANDBYTES = [Format("int8", "channel", scale="absmax"), Format("nf4", "group", 32, scale="absmax")]


def named(format: Format) -> str:
    held = "dynamic" if format.dynamic else "static"
    group = f" of {format.group_size}" if format.group_size else ""
    return f"{format.element} {format.granularity}{group} {format.scale} {'' if format.symmetric else 'zero '}{held}"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def odd(dtype: torch.dtype) -> list[Tensor]:
    """Halfway points of every format, denormals, infinities, NaN, zeros, and everything that is no plain matrix."""
    halves = torch.cat([torch.from_numpy(exact.halfways(e)).float()[:96].clone() for e in exact.ELEMENTS])
    halves = torch.nn.functional.pad(halves, (0, -len(halves) % 96)).view(-1, 96)
    ends = numbers(6, 96)
    ends[0], ends[1], ends[2, 3], ends[3, 5], ends[4, 7] = 0.0, -0.0, torch.nan, torch.inf, -torch.inf
    ends[5] = torch.linspace(-1, 1, 96) * 1e-40
    magnitudes = numbers(150, 96) * torch.exp2(torch.linspace(-145, 125, 150)[:, None])
    magnitudes[-1] = torch.linspace(-1, 1, 96) * torch.finfo(torch.float32).max
    return [
        each.to(dtype) for each in (halves, ends, magnitudes, numbers(1, 1, 96), numbers(3, 40_032), numbers(96, 9).T)
    ] + [
        numbers(2, 96, 3, 48).to(dtype),
        numbers(2, 96, 3, 48).to(dtype).to(memory_format=torch.channels_last),
        numbers(2, 192).to(dtype)[:, ::2],
        numbers(1, 96).to(dtype).expand(3, 96),
        torch.empty(0, 96, dtype=dtype),
    ]


def constants(x: Tensor, format: Format) -> dict[str, Tensor]:
    if format.scale == "e4m3":
        return {"global_scale": reference.global_scale_of(x.float().nan_to_num(0, posinf=0).abs().sum().clamp(max=3.0))}
    if format.dynamic:
        return {}
    point = {} if format.symmetric else {"zero_point": torch.tensor([-3], dtype=torch.int8)}
    return {"scale": torch.tensor([0.0131]).bfloat16(), **point}


def divides(columns: int, format: Format) -> bool:
    return format.group_size is None or columns % format.group_size == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", DYNAMIC + STATIC, ids=named)
def test_activations_are_those_of_the_reference(format, dtype):
    for x in odd(dtype):
        given = constants(x, format)
        expected = reference.fake_quantize_activation(x, format, **given)
        found = kernels.fake_quantize_activation(x, format, **given)
        assert same(found, expected), tuple(x.shape)
        assert found.stride() == expected.stride() or not x.numel()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("format", WEIGHTS, ids=named)
def test_weights_are_those_of_the_reference(format, dtype):
    for x in odd(dtype)[:-1]:
        weight = x.nan_to_num(1.0, posinf=2.0, neginf=-3.0)
        if not divides(weight[0].numel(), format):
            continue
        groups = reference.weight_groups(weight, format)
        for clip in (None, (groups.amin(-1) * 0.7, groups.amax(-1) * 0.6)):
            expected = reference.quantize(weight, format, clip)
            both, values = kernels.quantize_and_hold(weight, format, clip)
            assert same_codes(both, expected)
            assert same_codes(kernels.quantize(weight, format, clip), expected)
            assert same(values, expected.dequantize(weight.dtype))
            assert same(kernels.fake_quantize(weight, format, clip), values)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("format", [*WEIGHTS, *BITSANDBYTES], ids=named)
def test_without_a_range_a_weight_is_held_as_with_the_range_of_all_of_it(format, dtype):
    for x in odd(dtype)[:-1]:
        weight = x.nan_to_num(1.0, posinf=2.0, neginf=-3.0)
        if format.scale == "absmax":
            weight = weight.clamp(-6e4, 6e4)  # what float16 holds
        if not divides(weight[0].numel(), format):
            continue
        found, values = kernels.quantize_and_hold(weight, format)
        expected, expected_values = kernels.quantize_and_hold(weight, format, choose_clip(weight, format))
        assert same_codes(found, expected) and same(values, expected_values)


@pytest.mark.parametrize("format", DYNAMIC, ids=named)
@given(rows=st.integers(1, 5), repeats=st.integers(1, 40), power=st.integers(-140, 120), seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_any_size_and_magnitude(format, rows, repeats, power, seed):
    x = numbers(rows, repeats * (format.group_size or 1), seed=seed) * 2.0**power
    given = constants(x, format)
    assert same(
        kernels.fake_quantize_activation(x, format, **given), reference.fake_quantize_activation(x, format, **given)
    )


@pytest.mark.parametrize("element", exact.FLOATS)
def test_every_number_of_16_bits(element):
    """Each in a token of its own beside the format's largest value, so that the scale is 1 (or e8m0's power of two)."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    patterns = patterns[patterns.isfinite()]
    x = torch.stack([patterns, torch.full_like(patterns, ELEMENTS[element].max)], -1)
    format = Format(element, "token", dynamic=True)
    assert same(kernels.fake_quantize_activation(x, format), reference.fake_quantize_activation(x, format))


def test_one_thread_or_more_compute_the_same():
    before = torch.get_num_threads()
    x = numbers(3, 50_000)
    try:
        for format in (Format("int8", "token", dynamic=True), Format("int8", "group", 16, False, dynamic=True)):
            found = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(kernels.fake_quantize_activation(x, format))
            assert same(*found)
    finally:
        torch.set_num_threads(before)


def test_gradients_go_straight_through():
    x = numbers(2, 96).requires_grad_()
    kernels.fake_quantize_activation(x, Format("int8", "token", dynamic=True)).mul(torch.arange(96.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(96.0).expand(2, 96))


@pytest.mark.parametrize("format", WEIGHTS, ids=named)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(format, bad):
    weight = numbers(3, 96)
    weight[1, 40] = bad
    for function in (kernels.quantize, kernels.fake_quantize, kernels.quantize_and_hold):
        with pytest.raises(JointoptError, match="weight: found NaN or infinity"):
            function(weight, format)


def test_what_the_reference_refuses_is_refused_alike():
    group = Format("int8", "group", 32, dynamic=True)
    for x, format in (
        (numbers(2, 40), group),
        (numbers(2, 40, 3, 3), group),
        (torch.ones(2, 32, dtype=torch.int64), group),
        (numbers(2, 32), Format("int8", "tensor")),
        (numbers(2, 32), BLOCKS[0]),
    ):
        said = []
        for module in (reference, kernels):
            with pytest.raises(JointoptError) as raised:
                module.fake_quantize_activation(x, format)
            said.append(str(raised.value))
        assert said[0] == said[1] and "\n" not in said[0]
    for weight in (numbers(2, 40), numbers(32), torch.empty(2, 0)):
        with pytest.raises(JointoptError):
            kernels.quantize(weight, group)


@pytest.mark.skipif(cpu.library() is None, reason="this machine has no C++ compiler")
def test_a_second_process_compiles_nothing():
    check = "import subprocess as s; from quant.kernels import cpu; run = s.run\n"
    check += "s.run = lambda c, **k: run(c, **k) if '--version' in c else 1 / 0\nassert cpu.library() is not None"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_without_a_compiler_plain_torch_computes_the_same_and_says_so_once(tmp_path):
    check = """
import torch, warnings
from quant import kernels, reference
from quant.formats import Format
x, format = torch.randn(4, 64), Format("int8", "token", dynamic=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = [kernels.fake_quantize_activation(x, format) for _ in range(3)]
assert torch.equal(found[0], reference.fake_quantize_activation(x, format))
print(len(said), said[0].message)
"""
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler"), "XDG_CACHE_HOME": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("1 quant: ") and "plain torch" in told.stdout and told.stdout.count("\n") == 1


@pytest.mark.slow
def test_the_triton_kernels_are_the_reference_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.triton_check", "cpu"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: the Triton kernels were interpreted, not run")
def test_the_triton_kernels_are_the_reference_on_a_gpu():
    told = subprocess.run([sys.executable, "-m", "tests.triton_check", "cuda"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_no_bit(default):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    names = ("W8A8", "W4A16_ASYM_G64", "NVFP4", "MXFP4", "BNB_NF4")
    forms = [scheme(name).weights for name in names]
    expected = [quantize(weight, form) for form in forms]
    try:
        torch.set_default_dtype(default)
        found = [quantize(weight, form) for form in forms]
        held = [each.dequantize() for each in found]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other, values in zip(expected, found, held, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.dequantize(), values)


def test_a_home_that_cannot_be_written_to_costs_no_kernels(tmp_path):
    (tmp_path / "file").write_text("")
    code = "from quant.kernels import cpu; assert cpu.library() is not None; print(cpu._folder())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
    assert not list(tmp_path.glob("jointopt-*"))
