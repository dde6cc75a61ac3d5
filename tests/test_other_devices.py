"""What a model on a GPU would meet, as far as a CPU can tell."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jointopt.rebuilding.held_cache import packed
from jointopt.rebuilding.runtime import held_groups
from jointopt.rebuilding.structure import format_record
from quant import reference
from quant.formats import SCHEMES, scheme
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
