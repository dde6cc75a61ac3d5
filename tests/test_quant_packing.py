"""What is stored: its bytes, counted from shapes alone, and its bits, by arithmetic and against compressed-tensors."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jointopt.rebuilding.runtime import words
from jointopt.rebuilding.structure import _arguments
from quant.calibration import ActivationObserver
from quant.errors import JointoptError
from quant.formats import SCHEMES, Format, Scheme, scheme
from quant.kernels import quantize
from quant.packing import (
    constants_bytes,
    pack_int32,
    pack_nibbles,
    packed_tensors,
    storage_bytes,
)
from quant.tensors import code_values
from tests.reread import reread
from tests.same import same

SHAPES = (
    (1, 1), (3, 7), (5, 1), (1, 96), (16, 33), (9, 256), (300, 64),
    (6, 1, 3, 3), (8, 3, 7, 7), (8, 64, 1, 1), (12, 16, 3, 3), (5, 32, 2, 2), (64, 4, 1, 1),
)  # fmt: skip
WEIGHTED = [name for name, each in SCHEMES.items() if each.weights is not None]


def fitted(name: str, columns: int) -> Scheme | None:
    try:
        return scheme(name).fitted([columns])
    except JointoptError:
        return None


CASES = [(name, shape) for name in WEIGHTED for shape in SHAPES if fitted(name, prod(shape[1:]))]


def random_weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def constants(wanted: Scheme) -> dict[str, Tensor]:
    if not wanted.needs_constants:
        return {}
    observer = ActivationObserver(wanted.activations)
    observer.observe(random_weight((4, 8)))
    return observer.constants()


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_the_bytes_counted_from_the_shape_are_those_of_the_tensors(name, shape):
    wanted = fitted(name, prod(shape[1:]))
    tensors = packed_tensors(quantize(random_weight(shape), wanted.weights), wanted, constants(wanted))
    assert storage_bytes(wanted, shape, itemsize=4) == sum(tensor.nbytes for tensor in tensors.values())
    without = packed_tensors(quantize(random_weight(shape), wanted.weights), wanted)
    assert storage_bytes(wanted, shape, itemsize=4, embedding=True) == sum(t.nbytes for t in without.values())
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors.values())


def test_a_static_asymmetric_input_has_a_zero_point_of_a_byte():
    wanted = SCHEMES["W8A8_STATIC_ASYM"]
    assert constants_bytes(wanted) == sum(tensor.nbytes for tensor in constants(wanted).values()) == 3


OWN = {
    "INT4 a channel": Format("int4", "channel"),
    "INT4 a channel, zero points": Format("int4", "channel", symmetric=False),
    "INT4, a zero point": Format("int4", "tensor", symmetric=False),
    "NF4 a channel": Format("nf4", "channel"),
    "NF4, its largest": Format("nf4", "tensor", scale="absmax"),
    "E2M1 a channel": Format("fp4_e2m1", "channel"),
    "E4M3, largest of channels": Format("fp8_e4m3", "channel", scale="absmax"),
    "INT8, powers of two": Format("int8", "channel", scale="e8m0"),
}


@pytest.mark.parametrize("shape", [(5, 7), (3, 3, 3, 3), (300, 64)], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_a_scheme_of_one_s_own_has_the_bytes_that_are_counted_and_comes_back(name, shape):
    wanted = Scheme("MINE", OWN[name])
    quantized = quantize(random_weight(shape), wanted.weights)
    tensors = packed_tensors(quantized, wanted)
    assert storage_bytes(wanted, shape, itemsize=4) == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(reread(quantized, wanted), quantized.dequantize())
    codes = tensors.get("weight_packed", tensors.get("weight"))
    assert wanted.weights.bits == 8 or codes.nbytes < 0.6 * prod(shape) + 4 * shape[0]


@pytest.mark.parametrize("itemsize", [2, 4])
def test_an_unquantized_weight_has_the_bytes_of_its_elements(itemsize):
    assert storage_bytes(SCHEMES["none"], (6, 5, 3, 3), itemsize) == 6 * 5 * 9 * itemsize


@pytest.mark.parametrize("name", [n for n in WEIGHTED if SCHEMES[n].weights.granularity == "group"])
def test_the_bits_a_scheme_states_are_those_that_a_large_weight_is_stored_with(name):
    wanted = scheme(name).fitted([256])
    rows, columns = 1024, 256
    # What is stored once a layer is in both.
    stored = storage_bytes(wanted, (2 * rows, columns), 4) - storage_bytes(wanted, (rows, columns), 4)
    assert stored * 8 / (rows * columns) == wanted.bits


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_words_are_those_of_compressed_tensors_and_unpack_to_the_codes(bits, rows, columns, seed):
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=np.int8))
    packed = pack_int32(codes, bits)
    assert packed.dtype == torch.int32 and torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(words(packed, bits)[:, :columns], codes.float())
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((rows, columns))), codes)
    assert torch.equal(pack_int32(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0))


def test_every_word_of_two_codes_is_as_written_down():
    assert pack_int32(torch.tensor([[-8, 7, 0, 0, 0, 0, 0, -1]], dtype=torch.int8), 4).tolist() == [[0x788888F0]]
    assert pack_int32(torch.tensor([[-128, 127]], dtype=torch.int8), 8).tolist() == [[0xFF00]]
    assert pack_nibbles(torch.tensor([[1, 15, 8, 0]], dtype=torch.uint8)).tolist() == [[0xF1, 0x08]]


@given(rows=st.integers(1, 9), pairs=st.integers(1, 40), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_nibbles_are_those_of_compressed_tensors(rows, pairs, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (rows, 2 * pairs), dtype=np.uint8))
    packed = pack_nibbles(codes)
    values = code_values(codes, SCHEMES["NVFP4"].weights.kind)
    assert packed.dtype == torch.uint8 and torch.equal(packed, pack_fp4_to_uint8(values))
    assert torch.equal(unpack_fp4_from_uint8(packed, rows, 2 * pairs).float(), values)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def their_scheme(wanted: Scheme) -> QuantizationScheme:
    arguments: QuantizationArgs = _arguments(wanted.weights, False)
    return QuantizationScheme(targets=["Linear"], weights=arguments, format=wanted.compressed)


@pytest.mark.parametrize("shape", [(8, 256), (5, 128), (33, 384)], ids=str)
@pytest.mark.parametrize("name", [n for n in WEIGHTED if SCHEMES[n].compressed])
def test_a_checkpoint_holds_what_compressed_tensors_would_write(name, shape):
    """From the same weight and the same scales: the same tensors, by name, type and bit."""
    wanted = scheme(name).fitted([shape[1]])
    weight = random_weight(shape)
    quantized = quantize(weight, wanted.weights)
    state = {"weight": weight, "weight_scale": quantized.effective_scale()}
    if quantized.global_scale is not None:
        state |= {"weight_scale": quantized.scale.float(), "weight_global_scale": quantized.global_scale}
    if quantized.zero_point is not None:
        state["weight_zero_point"] = quantized.zero_point
    theirs = BaseCompressor.get_value_from_registry(wanted.compressed).compress(state, their_scheme(wanted))
    ours = packed_tensors(quantized, wanted)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        expected = theirs[key].to(tensor.dtype) if key == "weight_scale" else theirs[key]
        assert tensor.dtype == expected.dtype and tensor.shape == expected.shape, key
        assert torch.equal(bits(tensor), bits(expected)), key


@pytest.mark.parametrize("name", [n for n in WEIGHTED if SCHEMES[n].compressed])
def test_compressed_tensors_reads_the_values_that_were_scored(name):
    wanted = scheme(name).fitted([256])
    quantized = quantize(random_weight((16, 256)), wanted.weights)
    compressor = BaseCompressor.get_value_from_registry(wanted.compressed)
    stored = packed_tensors(quantized, wanted)
    if wanted.weights.scale == "bfloat16":
        stored["weight_scale"] = stored["weight_scale"].float()
    read = compressor.decompress(stored, their_scheme(wanted))["weight"]
    dtype = torch.float32 if wanted.weights.scale == "bfloat16" else torch.bfloat16
    assert torch.equal(read.to(dtype), quantized.dequantize(dtype))


def test_what_is_packed_is_a_copy_that_keeps_its_bits_on_disk(tmp_path):
    from safetensors.torch import load_file, save_file

    for name in WEIGHTED:
        wanted = scheme(name).fitted([128])
        quantized = quantize(random_weight((6, 128)), wanted.weights)
        tensors = packed_tensors(quantized, wanted)
        save_file(tensors, tmp_path / "weight.safetensors")
        back = load_file(tmp_path / "weight.safetensors")
        assert set(back) == set(tensors) and all(same(back[key], tensor) for key, tensor in tensors.items())
