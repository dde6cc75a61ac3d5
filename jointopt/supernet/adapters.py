"""LoRA adapters as parameters of a model's own layers: what they add to a weight (arXiv 2106.09685).

A sub-network computes with W[:rows, :columns] + scale * B[:rows] A[:, :columns].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from jointopt.names import ADAPTERS
from search_spaces.clones import structural_clones


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer, of those with an adapter."""
    return {path: module for path, module in model.named_modules() if _has_adapter(module)}


def _has_adapter(layer: nn.Module) -> bool:
    return ADAPTERS[0] in layer._parameters


def effective(layer: Any) -> Tensor:
    """A layer's weight, with its adapter where it has one; through which gradients then reach the adapter alone."""
    if not _has_adapter(layer):
        return layer.weight
    return (layer.weight + layer.lora_scale * (layer.lora_B @ layer.lora_A)).to(layer.weight.dtype)


def with_adapters(model: nn.Module) -> nn.Module:
    """The model in which adapters are part of the weights; itself where there are none."""
    if not adapted(model):
        return model
    clones, _ = structural_clones(model)
    absorb(clones.values())
    return clones[""]


def absorb(clones: Iterable[nn.Module], training: bool = True) -> None:
    """Makes adapters part of the weights, in clones of a model's modules; with `training` gradients reach them."""
    for layer in clones:
        if _has_adapter(layer):
            whole = effective(layer)
            weight = whole if training else nn.Parameter(whole.detach(), requires_grad=False)
            layer._parameters["weight"] = weight  # type: ignore[assignment]
            take_off(layer)


def take_off(layer: nn.Module) -> None:
    """The layer without its adapter."""
    del layer.__dict__["lora_scale"]
    for name in ADAPTERS:
        del layer._parameters[name]
