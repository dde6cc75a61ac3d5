"""Weights as the file beside an export reads them out of what the export stores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jointopt.rebuilding.runtime import rebuild
from jointopt.rebuilding.structure import rebuild_spec, tensors_of
from quant.formats import Scheme
from quant.layers import as_quantized
from quant.tensors import QuantizedTensor


def stock_model(shape: tuple[int, ...]) -> nn.Sequential:
    """One layer, whose weight has this shape."""
    rows, columns, *kernel = shape
    with torch.device("meta"):
        layer = nn.Conv2d(columns, rows, tuple(kernel), bias=False) if kernel else nn.Linear(columns, rows, bias=False)
    return nn.Sequential(layer).to_empty(device="cpu")


def reread(quantized: QuantizedTensor, scheme: Scheme) -> Tensor:
    """The values, float32, in the weight's shape; of bitsandbytes' schemes that file reads none."""
    model = stock_model(quantized.shape)
    as_quantized(model[0], scheme, quantized, {})
    again = rebuild(stock_model(quantized.shape), rebuild_spec(model, stock_model(quantized.shape), pack=True))
    again.load_state_dict(tensors_of(model))
    return again[0].weight
