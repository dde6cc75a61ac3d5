"""Quantized layers written out as the operators that ONNX Runtime computes them by.

Each stands in for a layer of the extracted model while that is exported, and holds its codes and scales as they are
stored. What PyTorch has no operator for is named by `torch.onnx.ops.symbolic`, whose result outside an export means
nothing. Scales of weights are bfloat16 on disk, as everywhere; their casts, transposes and the unpacking of weights
without a kernel of their own are folded by ONNX Runtime when it loads the model.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import ops

from jointopt.checkpoint.onnx.convolutions import DOMAIN, MARKER
from quant.formats import Format
from quant.layers import QuantizedLayer
from quant.packing import pack_nibbles
from quant.tensors import QuantizedTensor

CONTRIB = "com.microsoft"
BLOCKS = (128, 64, 32, 16)
FLOAT_ACCUMULATION, INT8_ACCUMULATION = 1, 4
"""MatMulNBits' accuracy levels: inputs as they are, or in INT8 with one scale a block."""


class OnnxLayer(nn.Module):
    """A quantized Linear, Conv2d or Embedding.

    Args:
        layer: of the extracted model (`quant.layers`).
        source: what was made of the layer that holds the same weight, where it is tied.
    """

    decoded: Tensor

    def __init__(self, layer: QuantizedLayer, source: OnnxLayer | None = None):
        super().__init__()
        for name, value in vars(layer).items():  # which code around a layer may read: stride, in_features
            if isinstance(value, int | tuple | str) and not name.startswith("_"):
                setattr(self, name, value)
        quantized = layer.quantized.to(torch.device("cpu"))
        self.weights, self.shape = quantized.format, quantized.shape
        self.activations: Format | None = None
        self.input_scale: Tensor | None
        self.input_zero_point: Tensor
        if source is None:
            self.codes, self.weight_scale, self.weight_zero_point = stored(quantized)
        else:
            self.codes, self.weight_scale = source.codes, source.weight_scale
            self.weight_zero_point = source.weight_zero_point
            if hasattr(source, "decoded"):
                self.decoded = source.decoded
        self.bias = getattr(layer, "bias", None)
        if not isinstance(layer, nn.Embedding):
            self.activations = layer.scheme.activations
            scale, zero_point = layer.input_scale, layer.input_zero_point
            self.register_buffer("input_scale", None if scale is None else scale.cpu().float().reshape(()))
            shifted = torch.tensor(128) if zero_point is None else zero_point.cpu().int().reshape(()) + 128
            self.register_buffer("input_zero_point", shifted.to(torch.uint8))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """What code around a layer asks for the type that it computes in."""
        return torch.empty(0, dtype=torch.float32)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes stand for, before their scale."""
        if hasattr(self, "decoded"):
            return self.decoded[codes.long()]
        return unpacked(codes) if self.weights.bits == 4 else codes

    def values(self) -> Tensor:
        """The weight in float32, which ONNX Runtime folds into a constant."""
        rows, columns = self.shape[0], prod(self.shape[1:])
        values = self.numbers(self.codes.reshape(rows, -1)).float()
        values = values if values.shape[1] == columns else values[:, :columns]
        scale = self.weight_scale.float()
        if scale.dim() == 1:
            return (values * scale).reshape(self.shape)
        grouped = values.reshape(rows, scale.shape[1], columns // scale.shape[1])
        if self.weight_zero_point is not None:
            grouped = grouped - unpacked(self.weight_zero_point)[:, : scale.shape[1], None].float()
        return (grouped * scale[..., None]).reshape(self.shape)


def stored(quantized: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [rows, bytes], scales and zero points as the file has them; see `checkpoint.onnx.writer.onnx_bytes`."""
    kind = quantized.format.kind
    zero_point = None
    if quantized.format.bits == 4:
        odd = quantized.codes.shape[1] % 2  # a kernel's, of an odd number of channels: a code more, which none reads
        codes = pack_nibbles(nn.functional.pad((quantized.codes + 8).to(torch.uint8), (0, odd)))
        if quantized.zero_point is not None:
            padded = nn.functional.pad(quantized.zero_point + 8, (0, quantized.zero_point.shape[1] % 2))
            zero_point = pack_nibbles(padded.to(torch.uint8)).contiguous()
    else:
        assert kind.dtype is not None
        codes = quantized.codes if kind.dtype == torch.int8 else quantized.codes.contiguous().view(kind.dtype)
    return codes.contiguous(), quantized.scale.contiguous(), zero_point


def unpacked(packed: Tensor) -> Tensor:
    """Bytes [..., n] as the signed 4-bit numbers [..., 2 n] that they hold, float32."""
    low = ops.symbolic(
        "BitwiseAnd", (packed, torch.tensor(15, dtype=torch.uint8)), dtype=packed.dtype, shape=packed.shape
    )
    shift = (packed, torch.tensor(4, dtype=torch.uint8))
    high = ops.symbolic("BitShift", shift, {"direction": "RIGHT"}, dtype=packed.dtype, shape=packed.shape)
    pairs = torch.stack((low.float(), high.float()), -1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1]) - 8


class OnnxEmbedding(OnnxLayer):
    """Rows of codes and of scales are looked up, and multiplied. Those of FP8 are looked up as bytes, since ONNX
    Runtime gathers no floats of 8 bits, and become numbers by a table of all 256."""

    def __init__(self, layer: QuantizedLayer, source: OnnxLayer | None = None):
        super().__init__(layer, source)
        if self.codes.dtype not in (torch.int8, torch.uint8):
            self.decoded = torch.arange(256, dtype=torch.uint8).view(self.codes.dtype).float()
            self.codes = self.codes.view(torch.uint8)

    def forward(self, input: Tensor) -> Tensor:
        values = self.numbers(self._looked_up(self.codes, input)).float()[..., : self.shape[1]]
        if self.weight_scale.dim() == 1:
            return values * self.weight_scale.float()
        scale = self._looked_up(self.weight_scale, input).float()
        groups = scale.shape[-1]
        grouped = values.reshape(*input.shape, groups, self.shape[1] // groups)
        if self.weight_zero_point is not None:
            grouped = grouped - unpacked(self._looked_up(self.weight_zero_point, input))[..., :groups, None]
        return (grouped * scale[..., None]).reshape(*input.shape, self.shape[1])

    def _looked_up(self, table: Tensor, ids: Tensor) -> Tensor:
        shape = (*ids.shape, table.shape[1])
        return ops.symbolic("Gather", (table, ids), {"axis": 0}, dtype=table.dtype, shape=shape)


class OnnxLinear(OnnxLayer):
    """Integer products where the input is INT8, MatMulNBits for INT4 weights, else a product in float32."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4:  # tokens in a grid
            return self(input.flatten(0, 2)).unflatten(0, input.shape[:3])
        if self.weights.bits == 4 and (block := self._block()):
            product = self._block_product(input, block)
        elif self.activations is not None and not self.activations.kind.is_float:
            product = self._integer_product(input)
        else:
            product = held(input, self.activations, self.input_scale) @ self.values().T
        return product if self.bias is None else product + self.bias

    def _integer_product(self, x: Tensor) -> Tensor:
        assert self.activations is not None
        codes, scale, zero_point = integers(x, self.activations, self.input_scale, self.input_zero_point)
        weight = self.codes.T
        shape = (*x.shape[:-1], self.shape[0])
        inputs = (codes, weight, zero_point, torch.tensor(0, dtype=torch.int8))
        products = ops.symbolic("MatMulInteger", inputs, dtype=torch.int32, shape=shape)
        if scale.dim() == 0:  # in the order that ONNX Runtime fuses
            return products.float() * (scale * self.weight_scale.float().reshape(-1))
        return products.float() * scale * self.weight_scale.float().reshape(-1)

    def _block(self) -> int | None:
        """Weights in a block of MatMulNBits: those of a group; for one scale a row, as many as fit."""
        columns, groups = self.shape[1], self.weight_scale.shape[-1]
        if groups > 1 or columns in BLOCKS:
            return columns // groups
        return next((block for block in BLOCKS if columns % block == 0), None)

    def _block_product(self, x: Tensor, block: int) -> Tensor:
        rows, columns = self.shape
        packed = self.codes.reshape(rows, columns // block, block // 2)
        scale = self.weight_scale.float().expand(rows, columns // block)
        inputs = [x, packed, scale.reshape(-1)]
        if self.weight_zero_point is not None:
            inputs.append(self.weight_zero_point.reshape(-1))
        level = FLOAT_ACCUMULATION if self.activations is None else INT8_ACCUMULATION
        attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": 4, "block_size": block, "accuracy_level": level}
        shape = (*x.shape[:-1], rows)
        return ops.symbolic(f"{CONTRIB}::MatMulNBits", inputs, attributes, dtype=x.dtype, shape=shape, version=1)


class OnnxConv2d(OnnxLayer):
    """Integer products where the input is INT8 (see `convolutions`), else a convolution in float32."""

    stride: tuple[int, ...]
    padding: Any
    padding_mode: str
    dilation: tuple[int, ...]
    groups: int

    def __init__(self, layer: QuantizedLayer, source: OnnxLayer | None = None):
        super().__init__(layer, source)
        assert isinstance(layer, nn.Conv2d)
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        self.pads, self.around = [top, left, bottom, right], (left, right, top, bottom)
        if layer.padding_mode != "zeros":
            self.pads, self.padding = [0, 0, 0, 0], (0, 0)
        self.whole = self.activations is not None and not self.activations.kind.is_float
        if self.whole:
            self.codes = self.codes.reshape(self.shape)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self.around, mode=self.padding_mode)
        options = (self.stride, self.padding, self.dilation, self.groups)
        if self.activations is None or not self.whole:
            return nn.functional.conv2d(held(x, self.activations, self.input_scale), self.values(), self.bias, *options)
        shape = nn.functional.conv2d(x, self.codes.float(), None, *options).shape
        codes, scale, zero_point = integers(x, self.activations, self.input_scale, self.input_zero_point)
        static = (None, None) if self.activations.dynamic else (self.input_scale, self.bias)
        inputs = (codes, self.codes, zero_point, self.weight_scale, *static)
        attributes: dict[str, Any] = {
            "strides": list(self.stride),
            "pads": self.pads,
            "dilations": list(self.dilation),
            "group": self.groups,
        }
        output = ops.symbolic(f"{DOMAIN}::{MARKER}", inputs, attributes, dtype=torch.float32, shape=shape, version=1)
        if not self.activations.dynamic:
            return output
        output = output * scale
        return output if self.bias is None else output + self.bias.reshape(1, -1, 1, 1)


def integers(x: Tensor, format: Format, scale: Tensor | None, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's input as uint8 codes, with their scale and zero point."""
    if format.dynamic:
        scale = dynamic_scale(x, format)
        codes = _quantize_linear(x / scale, torch.tensor(1.0, dtype=torch.float32), zero_point)
    else:
        assert scale is not None
        codes = _quantize_linear(x, scale, zero_point)
    return codes, scale, zero_point


def _quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return ops.symbolic("QuantizeLinear", (x, scale, zero_point), dtype=zero_point.dtype, shape=x.shape)


def dynamic_scale(x: Tensor, format: Format) -> Tensor:
    """One scale a token (of a convolution's input, a sample), as `quant.reference` has it."""
    dims = (1, 2, 3) if x.dim() == 4 else (-1,)
    scale = x.abs().amax(dims, keepdim=True) / ((format.kind.max - format.kind.min) / 2)
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def held(x: Tensor, format: Format | None, scale: Tensor | None) -> Tensor:
    """A layer's input with the values that FP8 holds, in float32."""
    if format is None:
        return x
    scale = dynamic_scale(x, format) if format.dynamic else scale
    assert scale is not None
    rounded = (x / scale).clamp(format.kind.min, format.kind.max).to(format.kind.dtype)
    return rounded.float() * scale
