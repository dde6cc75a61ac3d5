"""Layers that compute as their quantized selves would: stock layers whose weight already holds the format's values.

`as_quantized` makes one of a stock layer. While the range of its inputs is trained, whoever trains it also sets
`input_factor`, by which that is multiplied in its constants.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from quant.formats import Format, Scheme
from quant.kernels import fake_quantize_activation
from quant.learned_ranges import learn_input_range
from quant.reference import llm_int8_codes
from quant.tensors import QuantizedTensor


class QuantizedLayer(nn.Module):
    """What the quantized layers have in common.

    Attributes:
        scheme: the formats of its weight and its input.
        quantized: the codes that its weight stands for.
        input_scale, input_zero_point, input_global_scale: of a static activation format, else None.
        input_factor: by which the range of its inputs is multiplied while that is trained.
    """

    weight: Tensor
    scheme: Scheme
    quantized: QuantizedTensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_global_scale: Tensor | None
    input_factor: Tensor | None = None

    def constants(self) -> dict[str, Tensor | None]:
        names = ("input_scale", "input_zero_point", "input_global_scale")
        return {name: getattr(self, name) for name in names}

    def _held(self, x: Tensor) -> Tensor:
        form = self.scheme.activations
        if form is None:
            return x
        if self.input_factor is None:
            return held_input(self, x, form, **self.constants())
        held = held_input(self, x.detach(), form, **self.constants())
        return learn_input_range(x, held, form, self.constants(), self.input_factor)


def held_input(
    layer: object,
    x: Tensor,
    format: Format,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_global_scale: Tensor | None = None,
) -> Tensor:
    """A layer's input as its activation format holds it: four dimensions are a convolution's [N, C, H, W], or for any
    other layer tokens in a grid, channels last."""
    constants = (input_scale, input_zero_point, input_global_scale)
    if x.dim() == 4 and not isinstance(layer, nn.Conv2d):
        return fake_quantize_activation(x.flatten(0, 2), format, *constants).view(x.shape)
    return fake_quantize_activation(x, format, *constants)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with its input and its weight as the scheme holds them."""

    def forward(self, input: Tensor) -> Tensor:
        if self.scheme.activations is not None and self.scheme.activations.scale == "absmax":
            return llm_int8_linear(input, self.quantized.to(input.device), self.bias)
        return super().forward(self._held(input))


def llm_int8_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """A linear layer by LLM.int8 (Dettmers et al., arXiv 2208.07339), with bitsandbytes' arithmetic bit for bit.

    Products of codes are scaled once, and outlier columns are multiplied unquantized (equation 8). Its rounding of the
    input would turn a difference in the last bit into one of a whole step, so its operations are followed one by one,
    with the constants as its kernels have them.

    Args:
        x: [..., features].
        weight: codes and largest magnitudes of rows, as `quantize` makes them.
    """
    tokens = x.reshape(-1, x.shape[-1])
    codes, largest, outliers = llm_int8_codes(tokens)
    products = codes @ weight.codes.float().T
    output = products * (largest * weight.scale.T) * 6.200124e-05
    if bias is not None:
        output += bias
    output = output.to(x.dtype)
    if outliers.any():
        columns = weight.codes[:, outliers] * weight.scale * 7.874015718698502e-3
        output = output.addmm(tokens[:, outliers], columns.to(x.dtype).T)
    return output.reshape(*x.shape[:-1], -1)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution with its input and its weight as the scheme holds them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._held(input))


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """An embedding whose table holds the format's values; its input is indices, so nothing else is quantized."""


_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    nn.Embedding: QuantizedEmbedding,
}


def as_quantized(
    layer: nn.Module, scheme: Scheme, quantized: QuantizedTensor, constants: Mapping[str, Tensor | None]
) -> None:
    """Has a stock layer, in place, quantize its input; its weight is not touched.

    Args:
        quantized: the codes that its weight stands for.
        constants: of a static activation format: `input_scale`, `input_zero_point`, `input_global_scale`.
    """
    layer.__class__ = _QUANTIZED[next(kind for kind in _QUANTIZED if isinstance(layer, kind))]
    none = {"input_scale": None, "input_zero_point": None, "input_global_scale": None}
    layer.__dict__.update(scheme=scheme, quantized=quantized, **{**none, **constants})
