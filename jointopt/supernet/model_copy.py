"""The model that a super-network is made of: copied, and what a copy or an export of it would lose told at once."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from jointopt.cost.positions import kind_of
from jointopt.rebuilding.loadable import check_loadable
from jointopt.rebuilding.timm_recipe import by_library
from quant.errors import JointoptError

LIBRARIES = ("torch", "transformers", "timm", "accelerate", "peft")
"""Whose hooks only watch, or come again with the model."""


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy, whose layers are all called.

    Raises:
        JointoptError: a tensor that is computed from others, or weights that are not finite, by their path; a dtype
            that is neither float32 nor bfloat16.
    """
    dtypes = {p.dtype for p in model.parameters()}
    if not dtypes <= {torch.float32, torch.bfloat16}:
        raise JointoptError(f"dtype: the model holds {', '.join(map(str, dtypes))}; allowed: float32, bfloat16")
    for path, weights in model.named_parameters():
        if not weights.is_meta and not weights.detach().isfinite().all():
            raise JointoptError(f"{path}: found NaN or infinity; allowed: finite numbers")
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise JointoptError(
                    f"model: {path}.{name} is computed from others (pruning); allowed: a plain tensor, as "
                    "torch.nn.utils.prune.remove leaves it"
                )
    copied = copy.deepcopy(model)
    _call_layers(copied)
    return copied


def _call_layers(model: nn.Module) -> None:
    """Has torch's own encoders call their linear layers in eval mode, too: one kernel for the whole block (and nested
    tensors, which nothing else takes) would read the weights alone, and no input would be rounded."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def warn_of_what_is_lost(model: nn.Module) -> None:
    """Warns of what `export` would refuse after the search, of forward hooks, which no file holds, and of layers whose
    products no cost counts."""
    _warn_where_not_loadable(model)
    _warn_of_hooks(model)
    _warn_of_products(model)


def _warn_where_not_loadable(model: nn.Module) -> None:
    """Says at once what `export` would say after the search."""
    if by_library(model):
        try:
            check_loadable(model)
        except JointoptError as error:
            warnings.warn(f"{error}; this model can be searched, but not exported for its library", stacklevel=5)


def _warn_of_products(model: nn.Module) -> None:
    kinds = {
        type(module).__name__
        for module in model.modules()
        if kind_of(module) is None and getattr(module._parameters.get("weight"), "ndim", 0) > 1
    }
    if kinds:
        warnings.warn(
            f"model: has layers of kind {', '.join(sorted(kinds))}, whose MACs and time are not counted; they stay "
            "whole and unquantized",
            stacklevel=5,
        )


def _warn_of_hooks(model: nn.Module) -> None:
    """Of the user's own, which no file holds; those of libraries watch, or come again with the model."""
    for path, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            made_by = getattr(getattr(hook, "func", hook), "__module__", None) or ""
            if made_by.partition(".")[0] not in LIBRARIES:
                warnings.warn(
                    f"model: {path or 'it'} has a forward hook, which is scored with it and is no part of an export",
                    stacklevel=5,
                )
                return
