"""Fast quantization behind one dispatch: what `quant.reference` computes, to the bit, on whatever device the tensor is.

CPU: one pass over memory in compiled C++ (cpu.py). CUDA: Triton (cuda.py). What a kernel does not take (float64,
tensors that are traced or fake, bitsandbytes' formats, other devices) plain torch does: the same numbers, slower.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from quant import reference
from quant.formats import Format
from quant.kernels import cpu, grouped
from quant.kernels.grouped import KernelBackend
from quant.reference import Clip
from quant.tensors import QuantizedTensor

__all__ = ["fake_quantize", "fake_quantize_activation", "pack", "quantize", "quantize_and_hold"]


def fake_quantize_activation(
    x: Tensor,
    format: Format,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """A layer's input as its activation format holds it: `quant.reference.fake_quantize_activation`, which see."""
    constants = (scale, zero_point, global_scale)
    single = all(each is None or (each.numel() == 1 and each.device == x.device) for each in constants)
    given = format.dynamic != (scale is not None) and (format.scale == "e4m3") == (global_scale is not None)
    kernels = _kernels(x, format) if single and given and (format.dynamic or format.granularity == "tensor") else None
    if kernels is None:
        return reference.fake_quantize_activation(x, format, *constants)
    return reference.straight_through(x, grouped.activation(kernels, x.detach(), format, *constants))


def quantize(weight: Tensor, format: Format, clip: Clip | None = None) -> QuantizedTensor:
    """Rounds a weight into a format: `quant.reference.quantize`, which see."""
    quantized, _ = _rounded(weight, format, clip, values=False)
    assert quantized is not None
    return quantized


def fake_quantize(weight: Tensor, format: Format, clip: Clip | None = None) -> Tensor:
    """The values that the format can hold, in the weight's shape and dtype."""
    _, values = _rounded(weight, format, clip, codes=False)
    assert values is not None
    return values


def quantize_and_hold(weight: Tensor, format: Format, clip: Clip | None = None) -> tuple[QuantizedTensor, Tensor]:
    """`quantize` and `fake_quantize` in one pass."""
    quantized, values = _rounded(weight, format, clip)
    assert quantized is not None and values is not None
    return quantized, values


def pack(codes: Tensor, bits: int, offset: int, dtype: torch.dtype) -> Tensor | None:
    """Codes [rows, n] + offset as words of `dtype`, the first lowest; None where no kernel does it (on a CPU)."""
    if codes.device.type != "cuda" or _backend("cuda") is None:
        return None
    from quant.kernels import cuda

    return cuda.pack(codes, bits, offset, dtype)


def _rounded(
    weight: Tensor, format: Format, clip: Clip | None, codes: bool = True, values: bool = True
) -> tuple[QuantizedTensor | None, Tensor | None]:
    """(`quantize`, `fake_quantize`), each if it is wanted."""
    plain = clip is None or all(each.dtype == torch.float32 and each.device == weight.device for each in clip)
    kernels = _kernels(weight, format) if plain and weight.dim() >= 2 else None
    if kernels is not None:
        return grouped.weight(kernels, weight, format, clip, codes, values)
    quantized = reference.quantize(weight, format, clip)
    return quantized, quantized.dequantize(weight.dtype) if values else None


def _kernels(x: Tensor, format: Format) -> KernelBackend | None:
    """The backend of the tensor's device, None where plain torch is to do it."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.numel()
    if not plain or not grouped.takes(x, format) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    return _backend(x.device.type)


@cache
def _has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    warnings.warn("quant: found no triton; plain torch rounds on CUDA, slower", RuntimeWarning, stacklevel=2)
    return False


def _backend(device: str) -> KernelBackend | None:
    if device == "cpu":
        return cpu if cpu.library() is not None else None
    if device == "cuda" and _has_triton():
        from quant.kernels import cuda  # Triton takes a second to import, and is not everywhere

        return cuda
    return None
