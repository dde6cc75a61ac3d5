"""The widths of a transformer's blocks, as its config lists them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from quant.errors import JointoptError, in_one_line


def settle_sizes(model: nn.Module, config: Any) -> None:
    """Writes into the config what the stock class can build: uniform widths at once, others layer by layer.

    Per-layer sizes go under the standard key `per_layer_config`, beside which the global ones stay as they were.
    """
    head_dim = _head_dim(model)
    if head_dim is not None and getattr(config, "head_dim", None) != head_dim:
        config.head_dim = head_dim
    sizes = sizes_of_blocks(model, config)
    keys = {key for each in sizes for key in each}
    uniform = {key: {each.get(key) for each in sizes} for key in keys}
    for key, values in uniform.items():
        if len(values) == 1 and None not in values:
            setattr(config, key, values.pop())
    differing = [k for k, values in uniform.items() if len(values) > 1]
    layered = {
        at: {key: each[key] for key in differing if key in each and each[key] != getattr(config, key)}
        for at, each in enumerate(sizes)
    }
    layered = {at: each for at, each in layered.items() if each}
    if layered:
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = layered


def save_configs(model: Any, place: Path) -> None:
    """Writes config.json with the model's own sizes, and generation_config.json of a model that generates, for programs
    that read them beside another library's file."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    settle_sizes(model, config)
    config.save_pretrained(place)
    save_generation_config(model, place)


def save_generation_config(model: Any, place: Path) -> None:
    """generation_config.json of a model that generates.

    Raises:
        JointoptError: it was changed into one that transformers does not write.
    """
    found = getattr(model, "generation_config", None)
    try:
        if found is not None:
            found.save_pretrained(place)
    except ValueError as error:
        raise JointoptError(f"export: model.generation_config: {in_one_line(error)}; allowed: a valid one") from error


def sizes_of_blocks(model: nn.Module, config: Any) -> list[dict[str, int]]:
    """For each block of a transformer, the config entries that describe its widths: of those that its config has.

    BERT's heads are not among them: its config derives the head size from their number.
    """
    return [_sizes_of(block, config) for block in _blocks(model)]


def _blocks(model: nn.Module) -> list[nn.Module]:
    for path, container in model.named_modules():
        if isinstance(container, nn.ModuleList) and path.endswith(("layers", "encoder.layer", "transformer.layer")):
            return list(container)
    return []


def _head_dim(model: nn.Module) -> int | None:
    """The head size, of all blocks, where it is no matter of the number of heads."""
    modules = (module for block in _blocks(model) for module in block.modules())
    queries = (each for each in modules if isinstance(getattr(each, "q_proj", None), nn.Linear))
    return next((size for each in queries if (size := getattr(each, "head_dim", None))), None)


def _sizes_of(block: nn.Module, config: Any) -> dict[str, int]:
    sizes = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(("up_proj", "fc1", "intermediate.dense")):
            sizes["intermediate_size"] = module.out_features
        if name == "ffn.lin1":
            sizes["hidden_dim"] = module.out_features
        head_dim = getattr(block.get_submodule(name.rpartition(".")[0]), "head_dim", None)
        if name.endswith("q_proj") and head_dim:
            sizes["num_attention_heads"] = module.out_features // head_dim
        if name.endswith("k_proj") and head_dim:
            sizes["num_key_value_heads"] = module.out_features // head_dim
    return {key: value for key, value in sizes.items() if hasattr(config, key)}


def is_uniform(model: Any) -> bool:
    """Whether all blocks of a language model are of one size, and whole."""
    sizes = sizes_of_blocks(model, model.config)
    return all(each == sizes[0] for each in sizes) and len(sizes[0]) == 3
