"""Layers that compute as their quantized selves would: stock layers whose weight already holds the format's values.

The attributes are set by whoever makes one of a stock layer: `scheme`; `quantized`, the codes that the weight stands
for; and the constants of a static activation format, `input_scale`, `input_zero_point`, `input_global_scale`.
"""

from __future__ import annotations

from torch import Tensor, nn

from quant.formats import Scheme
from quant.reference import QuantizedTensor, fake_quantize_activation


class _Quantized:
    scheme: Scheme
    quantized: QuantizedTensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_global_scale: Tensor | None

    def statistics(self) -> dict[str, Tensor | None]:
        names = ("input_scale", "input_zero_point", "input_global_scale")
        return {name: getattr(self, name) for name in names}

    def _held(self, x: Tensor) -> Tensor:
        if self.scheme.activations is None:
            return x
        return fake_quantize_activation(
            x, self.scheme.activations, self.input_scale, self.input_zero_point, self.input_global_scale
        )


class QuantizedLinear(_Quantized, nn.Linear):
    """A linear layer with its input and its weight as the scheme holds them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._held(input))


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """A convolution with its input and its weight as the scheme holds them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._held(input))


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """An embedding whose table holds the format's values; its input is indices, so nothing else is quantized."""
