"""What a model on a GPU would meet, as far as a CPU can tell."""

from __future__ import annotations

import contextlib
import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jointopt.rebuilding.held_cache import packed
from jointopt.rebuilding.runtime import held_groups
from jointopt.rebuilding.structure import format_record
from quant import reference
from quant.formats import SCHEMES, scheme
from quant.kernels import grouped
from tests.zoo import supernet_of


class PlainDivisors(TorchDispatchMode):
    """Numbers that tensors are divided by where CUDA would multiply by their reciprocals, and lose a bit: those that
    are no tensors, but for powers of two."""

    def __init__(self):
        super().__init__()
        self.found: list[float] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("aten::div") and not isinstance(args[1], torch.Tensor):
            self.found += [] if math.frexp(args[1])[0] == 0.5 else [args[1]]
        return func(*args, **(kwargs or {}))


DYNAMIC = {
    name: each.activations
    for name, each in SCHEMES.items()
    if each.activations is not None and each.activations.dynamic and not each.bitsandbytes
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_scale_of_inputs_has_the_same_bits_on_cuda_in_the_search_and_in_the_export(name):
    format = DYNAMIC[name]
    x = torch.randn(4, 1, 64)
    whole = torch.ones(1) if format.scale == "e4m3" else None
    with PlainDivisors() as divisors:
        reference.fake_quantize_activation(x, format, global_scale=whole)
        held_groups(x, format_record(format), None, None, whole)
    assert divisors.found == []


@pytest.mark.parametrize("name", ["W8A8", "W4A16_ASYM_G32", "FP8", "NVFP4"])
def test_a_scale_of_weights_has_the_same_bits_on_cuda(name):
    with PlainDivisors() as divisors:
        reference.quantize(torch.randn(8, 64), scheme(name).weights)
    assert divisors.found == []


@pytest.mark.parametrize("element", ["int8", "int4", "fp8_e4m3", "fp4_e2m1"])
def test_a_scale_of_a_cache_has_the_same_bits_on_cuda(element):
    with PlainDivisors() as divisors:
        packed(torch.randn(1, 2, 3, 64), element)
    assert divisors.found == []


def test_the_original_follows_a_super_network_that_a_trainer_moved():
    supernet = supernet_of("vit")
    supernet.model.to("meta")
    with supernet.original() as original:
        assert {each.device.type for each in original.parameters()} == {"meta"}
    with supernet_of("vit").original() as original:
        assert {each.device.type for each in original.parameters()} == {"cpu"}


class Compiled:
    """In the place of a Triton kernel: compiles what it is launched with for an H100, which need not be there.

    Attributes:
        ptx: what the GPU would be given, one text a launch.
    """

    TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.int16: "i16", torch.uint8: "u8", torch.int32: "i32"}

    def __init__(self, kernel):
        self.kernel, self.ptx = kernel, []

    def __getitem__(self, grid):
        return self.launched

    def launched(self, *arguments, enable_fp_fusion=True, **constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False))
        fixed = constants | {name: None for name, each in given.items() if each is None}
        signature = {name: "constexpr" if name in fixed else self.type_of(given[name]) for name in names}
        source = ASTSource(self.kernel, signature, {(names.index(name),): each for name, each in fixed.items()}, {})
        options = {"enable_fp_fusion": enable_fp_fusion}
        self.ptx.append(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])

    def type_of(self, value):
        return f"*{self.TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["W8A8", "W8A8_ASYM", "FP8_DYNAMIC", "FP8_E5M2", "NVFP4", "MXFP4"])
def test_what_a_gpu_runs_rounds_each_operation_once(name, dtype, monkeypatch):
    """No division by a reciprocal, no product and sum in one, no number too small to be kept: the CPU's bits."""
    cuda = pytest.importorskip("quant.kernels.cuda", reason="NO TRITON HERE: its kernels were not compiled")
    compiled = Compiled(cuda._convert)
    monkeypatch.setattr(cuda, "_convert", compiled)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    whole = torch.ones(1) if name == "NVFP4" else None
    grouped.activation(cuda, torch.randn(4, 64, dtype=dtype), scheme(name).activations, None, None, whole)
    grouped.weight(cuda, torch.randn(4, 64, dtype=dtype), scheme(name).weights, None, codes=True, values=True)
    assert len(compiled.ptx) == 2
    for ptx in compiled.ptx:
        assert "div.rn.f32" in ptx
        assert re.findall(r"\b\w+\.(?:\w+\.)*(?:approx|full|ftz)\S*|\bfma\S+", ptx) == []
