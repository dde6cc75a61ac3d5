"""Codes as they are stored: bit-exact, in the layouts and under the names of compressed-tensors and bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from quant.formats import SCALES, Format, Scheme, dtype_name
from quant.kernels import pack
from quant.tensors import QuantizedTensor


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [rows, n] of 4 or 8 bits as int32 [rows, ceil(n * bits / 32)]: made unsigned, lowest bits first."""
    if (packed := pack(codes, bits, 1 << (bits - 1), torch.int32)) is not None:
        return packed
    per_word = 32 // bits
    shifted = codes.long() + (1 << (bits - 1))
    padded = torch.nn.functional.pad(shifted, (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (padded.unflatten(1, (-1, per_word)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit patterns [rows, n] as uint8 [rows, ceil(n / 2)], the first of each pair in the low half."""
    if (packed := pack(codes, 4, 0, torch.uint8)) is not None:
        return packed
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def layout(scheme: Scheme) -> str:
    """How the scheme's weight is stored: "words" (int32), "nibbles" (two in a uint8) or "bytes" (one element each)."""
    assert scheme.weights is not None
    kind = scheme.weights.kind
    if kind.bits == 4:
        return "nibbles" if kind.is_float else "words"
    return "words" if scheme.compressed == "pack-quantized" else "bytes"


def packed_tensors(
    quantized: QuantizedTensor,
    scheme: Scheme,
    constants: Mapping[str, Tensor | None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds for one layer, bias apart, by compressed-tensors' names or bitsandbytes'.

    Args:
        constants: `input_scale`, `input_zero_point`, `input_global_scale` of a static activation format.
        dtype: of the unquantized weight, which bitsandbytes notes.
    """
    if scheme.bitsandbytes:
        packed = _packed_for_bitsandbytes(quantized, scheme.bitsandbytes, dtype)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in packed.items()}
    bits = quantized.format.bits
    tensors: dict[str, Tensor] = {}
    how = layout(scheme)
    if how == "words":
        tensors["weight_packed"] = pack_int32(quantized.codes, bits)
        tensors["weight_shape"] = torch.tensor(quantized.shape, dtype=torch.int64)
        if (points := quantized.zero_point) is not None:
            tensors["weight_zero_point"] = pack_int32(points.T, bits).T if points.dim() == 2 else points
    elif how == "nibbles":
        tensors["weight_packed"] = pack_nibbles(quantized.codes)
    else:
        kind = quantized.format.kind
        assert kind.dtype is not None
        codes = quantized.codes if kind.dtype == torch.int8 else quantized.codes.contiguous().view(kind.dtype)
        tensors["weight"] = codes.reshape(quantized.shape)
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = quantized.zero_point
    tensors["weight_scale"] = quantized.scale
    if quantized.global_scale is not None:
        tensors["weight_global_scale"] = quantized.global_scale
    for name, tensor in (constants or {}).items():
        if tensor is not None:
            tensors[name] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _packed_for_bitsandbytes(quantized: QuantizedTensor, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the state dict of its Linear8bitLt or Linear4bit holds for the weight."""
    if kind == "llm_int8":
        row_major = torch.tensor(0, dtype=torch.uint8)
        return {"weight": quantized.codes, "SCB": quantized.scale.flatten(), "weight_format": row_major}
    codes = quantized.codes.flatten()
    state = json.dumps(_four_bit_state(quantized.format, kind, quantized.shape, dtype_name(dtype)))
    return {
        "weight": ((codes[0::2] << 4) | codes[1::2])[:, None],
        "weight.absmax": quantized.scale.flatten(),
        "weight.quant_map": torch.tensor(quantized.format.kind.values, dtype=torch.float32),
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


def _four_bit_state(format: Format, kind: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    return {"quant_type": kind, "blocksize": format.group_size, "dtype": dtype, "shape": list(shape)}


def _bytes_for_bitsandbytes(scheme: Scheme, shape: tuple[int, ...], itemsize: int) -> int:
    rows, columns = shape[0], prod(shape[1:])
    assert scheme.weights is not None and scheme.bitsandbytes is not None
    if scheme.bitsandbytes == "llm_int8":
        return rows * columns + 4 * rows + 1
    dtype = {2: "bfloat16", 4: "float32"}[itemsize]
    state = json.dumps(_four_bit_state(scheme.weights, scheme.bitsandbytes, shape, dtype))
    return rows * columns // 2 + 4 * rows * scheme.weights.groups_in(columns) + 4 * 16 + len(state)


def storage_bytes(scheme: Scheme, shape: tuple[int, ...], itemsize: int, embedding: bool = False) -> int:
    """Bytes of `packed_tensors`, from the weight's shape alone.

    Args:
        itemsize: bytes of one element of an unquantized weight.
        embedding: an embedding's input is never quantized, so it stores no constants of activations.

    Raises:
        JointoptError: the scheme's group size is still open, or does not divide.
    """
    rows, columns = shape[0], prod(shape[1:])
    format = scheme.weights
    if format is None:
        return rows * columns * itemsize
    if scheme.bitsandbytes:
        return _bytes_for_bitsandbytes(scheme, shape, itemsize)
    how = layout(scheme)
    scales = {"tensor": 1, "channel": rows}.get(format.granularity) or rows * format.groups_in(columns)
    total = scales * SCALES[format.scale] // 8
    if how == "words":
        total += 4 * rows * ceil(columns * format.bits / 32) + 8 * len(shape)
        if not format.symmetric:
            one = format.granularity == "tensor"
            total += 1 if one else 4 * ceil(rows * format.bits / 32) * (scales // rows)
    elif how == "nibbles":
        total += rows * ceil(columns / 2)
    else:
        total += rows * columns + (0 if format.symmetric else scales)
    if format.scale == "e4m3":
        total += 4
    return total + (0 if embedding else constants_bytes(scheme))


def constants_bytes(scheme: Scheme) -> int:
    """Bytes of a static activation format's constants."""
    format = scheme.activations
    if format is None or not scheme.needs_constants:
        return 0
    if format.scale == "e4m3":
        return 4
    return 2 if format.symmetric else 3
