"""Writes a sub-network as a folder that transformers or timm loads: its weights in model.safetensors, beside them the
config and, where the library builds no such layers, a short modelling file."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Collection, Mapping
from inspect import getsource
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from jointopt.checkpoint import card
from jointopt.files import write_tensors
from jointopt.rebuilding import held_cache, runtime, timm_loading
from jointopt.rebuilding.block_sizes import save_generation_config, settle_sizes
from jointopt.rebuilding.loadable import auto_class, check_loadable, made_by
from jointopt.rebuilding.structure import (
    bitsandbytes_config,
    by_bitsandbytes,
    by_compressed_tensors,
    compressed_config,
    on_meta,
    quantized_layers,
    rebuild_spec,
    tensors_of,
)
from jointopt.rebuilding.timm_recipe import from_recipe, preprocessing, recipe_of
from quant.formats import dtype_name
from search_spaces import stand_ins

MODELING = "modeling_jointopt.py"


def check(model: Any, processor: Any = None) -> None:
    """Raises JointoptError for a model that neither transformers nor timm builds again."""
    check_loadable(model)


def write(place: Path, model: Any, processor: Any, example: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """See `writers.Writer`. Raises JointoptError for what `check` refuses, and for formats that one folder cannot hold
    together."""
    write_weights(place, model)
    return {}, write_config(place, model)


def write_weights(place: Path, model: nn.Module) -> None:
    """model.safetensors, with every tensor as it is stored."""
    write_tensors(place / "model.safetensors", tensors_of(model), {"format": "pt"})


def write_config(place: Path, model: Any, names: bool = False) -> str:
    """What is beside the weights; `names` as `compressed_config` has it. Returns how to load the folder."""
    return _write_transformers(place, model, names) if hasattr(model, "config") else _write_timm(place, model)


def _write_transformers(place: Path, model: Any, names: bool) -> str:
    """config.json and, where it takes one, the modelling file. Returns how to load the folder."""
    config = copy.deepcopy(model.config)
    stock = type(model)
    auto = auto_class(stock, config)
    config.architectures = [stock.__name__]
    config.dtype = next(model.parameters()).dtype
    compressed, whole = by_compressed_tensors(model), by_bitsandbytes(model)
    settle_sizes(model, config)
    spec = rebuild_spec(model, on_meta(stock, config), pack=not (compressed or whole))
    loading = card.transformers_snippet(auto, place.name, bool(spec))
    if whole:
        config.quantization_config = bitsandbytes_config(model, whole)
    elif compressed and quantized_layers(model):
        config.quantization_config = compressed_config(model, names)
        loading += f"\n\n{card.UNPACKED}"
    if spec:
        name = f"Jointopt{stock.__name__}"
        config.jointopt = spec
        config.architectures = [name]
        config.auto_map = {auto: f"{MODELING.removesuffix('.py')}.{name}"}
        text = _modeling_file(stock, name, spec.get("tied", {}), "caches" in spec)
        base = type(model.base_model)
        if base is not stock and made_by("AutoModel", base, config):
            config.auto_map["AutoModel"] = f"{MODELING.removesuffix('.py')}.Jointopt{base.__name__}"
            text += _base_class(base, model.base_model_prefix, "caches" in spec)
        (place / MODELING).write_text(text)
    config.save_pretrained(place)
    save_generation_config(model, place)
    return loading


def in_one_file(first: ModuleType, *others: ModuleType) -> str:
    """The source of modules that import each other alone, or libraries, as that of one module."""
    source = getsource(first)
    own = ("from jointopt.", "from search_spaces.")
    for module in others:
        text = getsource(module)
        imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        there = {ast.unparse(node) for node in ast.parse(source).body}
        needed = [line for line in map(ast.unparse, imports) if line not in there and not line.startswith(own)]
        rest = "".join(text.splitlines(keepends=True)[imports[-1].end_lineno :]).strip("\n")
        source += "\n\n" + "".join(f"{line}  # noqa: E402\n" for line in needed) + "\n\n" * bool(needed) + rest + "\n"
    return source


def _modeling_file(stock: Any, name: str, packed: Collection[str], caches: bool) -> str:
    """The source of `name`. `packed`: paths of layers that take their codes from another."""
    source = in_one_file(stand_ins, runtime, *[held_cache] * caches)
    held = '        hold_caches(self, config.jointopt["caches"])\n' if caches else ""
    # A packed layer has no `weight` that the library could tie; what else is tied stays so.
    still = {k: v for k, v in (stock._tied_weights_keys or {}).items() if k.removesuffix(".weight") not in packed}
    untied = f"    _tied_weights_keys = {still}\n\n" if packed else ""
    built = f'''

from transformers import {stock.__name__}  # noqa: E402


class {name}({stock.__name__}):
    """{stock.__name__} with the sizes and number formats that config.json lists."""

{untied}    def __init__(self, config):
        super().__init__(config)
        rebuild(self, config.jointopt)
{held}
    def _get_name(self):  # by which the Trainer tells whose labels it has to shift
        return "{stock.__name__}"
'''
    return source + built


def _base_class(base: type, prefix: str, caches: bool) -> str:
    """The source of the class that AutoModel makes of the folder: the model without its head."""
    held = '        hold_caches(self, spec["caches"])\n' if caches else ""
    return f'''

from transformers import {base.__name__}  # noqa: E402


class Jointopt{base.__name__}({base.__name__}):
    """The `{prefix}` of the class above, alone."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        spec = spec_within(config.jointopt, "{prefix}")
        rebuild(self, spec)
{held}'''


def _write_timm(place: Path, model: nn.Module) -> str:
    recipe = recipe_of(model)
    spec = rebuild_spec(model, from_recipe(recipe), pack=True)
    dtype = dtype_name(next(model.parameters()).dtype)
    config = {"architecture": recipe["class"], "timm": recipe, "dtype": dtype, "jointopt": spec}
    config["pretrained_cfg"] = preprocessing(model)
    (place / "config.json").write_text(json.dumps(config, indent=1))
    (place / MODELING).write_text(in_one_file(stand_ins, runtime, timm_loading))
    return card.timm_snippet(place.name)
