"""Writes a sub-network as vLLM loads it: a stock LLaMA, or a DeciLM where blocks differ; fused layers in one format.

vLLM puts q, k, v into one layer and gate, up into another, takes no quantized embedding, and builds all blocks by one
config, but for those of its DeciLM: their entries in `block_configs` give the width of each FFN and leave out attention
or FFN (its `llama.py`, `nemotron_nas.py` and `compressed_tensors.py`, as of 0.33). The folder is one for transformers
too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jointopt.checkpoint.card import transformers_snippet
from jointopt.checkpoint.transformers_writer import MODELING, in_one_file, write_config, write_weights
from jointopt.rebuilding import runtime
from jointopt.rebuilding.block_sizes import is_uniform, save_generation_config
from jointopt.rebuilding.loadable import check_loadable
from jointopt.rebuilding.structure import (
    by_compressed_tensors,
    check_formats,
    check_language_model,
    compressed_config,
    on_meta,
    quantized_layers,
    rebuild_spec,
)
from jointopt.targets import TARGETS
from quant.errors import JointoptError
from quant.layers import QuantizedLayer
from search_spaces import stand_ins

KINDS = ("llama", "mistral", "qwen2", "qwen3")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FFN_STEP = 256
"""What `ffn_mult` is rounded up to, as an intermediate size."""

SNIPPET = """For vLLM: `vllm serve {folder}{option}`, or

```python
from vllm import LLM

model = LLM("{folder}"{argument})
```"""


def snippet(folder: str, uneven: bool) -> str:
    """How vLLM loads the folder."""
    option, argument = (" --trust-remote-code", ", trust_remote_code=True") if uneven else ("", "")
    return SNIPPET.format(folder=folder, option=option, argument=argument)


def write(place: Path, model: Any, processor: Any, example: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """See `writers.Writer`."""
    check(model)
    uneven = not is_uniform(model)
    write_weights(place, model)
    loading = _write_uneven(place, model) if uneven else write_config(place, model, names=True)
    return {"target": "vllm"}, f"{snippet(place.name, uneven)}\n\nFor transformers:\n\n{loading}"


def check(model: Any, processor: Any = None) -> None:
    """Raises JointoptError for a model of another family or that transformers does not build again, an activation,
    biases or a window of attention that vLLM does not have there, heads that differ from block to block, a first block
    without attention, a format that vLLM does not compute or that layers which it fuses do not share, a quantized
    embedding, head or cache; with the layer's name."""
    check_language_model(model, "vllm", KINDS)
    _check_computed(model)
    if not is_uniform(model):
        _check_blocks(model)
    layers = quantized_layers(model)
    check_formats(model, "vllm")
    check_loadable(model)
    for path, layer in layers.items():
        if not path.endswith("_proj"):
            raise JointoptError(
                f"export: {path}: target vllm: found it in {layer.scheme.name}; allowed: as it is "
                "(of the space: unquantized: [embedding, head])"
            )
    for path in layers:
        parent, _, name = path.rpartition(".")
        others = next((group for group in FUSED if name in group), (name,))
        found = [_scheme_of(layers.get(f"{parent}.{other}")) for other in others]
        if len(set(found)) > 1:
            told = ", ".join(f"{other} in {each}" for other, each in zip(others, found, strict=True))
            raise JointoptError(f"export: {parent}: target vllm: found {told}; allowed: one format, they are one layer")
    assert by_compressed_tensors(model), "all of the target's formats are compressed-tensors'"


def _check_computed(model: Any) -> None:
    """What vLLM's classes refuse to load, or drop without a word, of a model that they know by its config."""
    config, kind = model.config, model.config.model_type
    if config.hidden_act != "silu":
        raise JointoptError(f"target vllm: found hidden_act {config.hidden_act}; allowed: silu")
    if kind in ("qwen2", "qwen3") and len(found := sorted(set(config.layer_types or ()))) > 1:
        raise JointoptError(f"target vllm: found layers of {' and '.join(found)} in a {kind}; allowed: one of them")
    wanted = _biases(config)
    for path, layer in model.named_modules():
        name = path.rpartition(".")[2]
        if name not in wanted or (getattr(layer, "bias", None) is not None) == wanted[name]:
            continue
        told = ("without", "with") if wanted[name] else ("with", "without")
        raise JointoptError(f"target vllm: found {path} {told[0]} a bias; allowed for this {kind}: {told[1]} one")


def _biases(config: Any) -> dict[str, bool]:
    """Name of a projection -> whether vLLM builds it with a bias (its `llama.py`, which Mistral and DeciLM build on,
    `qwen2.py` and `qwen3.py`)."""
    attention, mlp = bool(getattr(config, "attention_bias", False)), False
    if config.model_type in ("llama", "mistral"):
        attention = attention or bool(getattr(config, "bias", False))
        inputs, output = bool(getattr(config, "qkv_bias", attention)), attention
        mlp = bool(getattr(config, "mlp_bias", False))
    else:
        inputs, output = config.model_type == "qwen2" or attention, False
    fused = dict.fromkeys(FUSED[0], inputs) | dict.fromkeys(FUSED[1], mlp)
    return fused | {"o_proj": output, "down_proj": mlp}


def _check_blocks(model: Any) -> None:
    """What DeciLM in vLLM asks of blocks that differ."""
    kind, uneven = model.config.model_type, TARGETS["vllm"].uneven or ()
    if kind not in uneven:
        raise JointoptError(
            f"target vllm: found a {kind} whose blocks differ; allowed: blocks all alike, or {', '.join(uneven)}"
        )
    blocks = list(model.get_submodule("model.layers"))
    heads = {_heads(block) for block in blocks if _has_attention(block)}
    if len(heads) > 1:
        told = ", ".join(str(queries) for queries, _ in sorted(heads))
        raise JointoptError(f"target vllm: found blocks of {told} heads; allowed: as many in all blocks")
    first = next((block for block in blocks if _has_attention(block) or _has_ffn(block)), None)
    if first is None or not _has_attention(first):
        raise JointoptError("target vllm: found a first block without attention; allowed: later blocks without")


def _scheme_of(layer: QuantizedLayer | None) -> str:
    return "none" if layer is None else layer.scheme.name


def _has_attention(block: Any) -> bool:
    return hasattr(block.self_attn, "q_proj")


def _has_ffn(block: Any) -> bool:
    return hasattr(block.mlp, "up_proj")


def _heads(block: Any) -> tuple[int, int]:
    """Query heads, key and value heads."""
    attention = block.self_attn
    return (
        attention.q_proj.out_features // attention.head_dim,
        attention.k_proj.out_features // attention.head_dim,
    )


def block_configs(model: Any) -> list[dict[str, dict[str, Any]]]:
    """For each block of a sub-network what vLLM's DeciLM builds it from."""
    found = []
    for block in model.get_submodule("model.layers"):
        attention: dict[str, Any] = {"no_op": not _has_attention(block)}
        if _has_attention(block):
            queries, keys = _heads(block)
            attention["n_heads_in_group"] = queries // keys
        ffn: dict[str, Any] = {"no_op": not _has_ffn(block)}
        if _has_ffn(block):
            ffn |= _width(block.mlp.up_proj.out_features, model.config.hidden_size)
        found.append({"attention": attention, "ffn": ffn})
    return found


def _width(size: int, hidden: int) -> dict[str, Any]:
    """`ffn_mult`, which every release with DeciLM reads, where it can say the size; else the size, for later ones."""
    if size % FFN_STEP == 0:
        return {"ffn_mult": 3 * size / (2 * hidden)}
    return {"intermediate_size": size}


def _write_uneven(place: Path, model: Any) -> str:
    """config.json of a DeciLM, and the modelling file by which transformers reads it. Returns how transformers does."""
    config = copy.deepcopy(model.config)
    attention = next(block for block in model.get_submodule("model.layers") if _has_attention(block))
    config.num_attention_heads, config.num_key_value_heads = _heads(attention)
    config.head_dim = attention.self_attn.head_dim
    spec = rebuild_spec(model, on_meta(type(model), config), pack=False)
    config.dtype = next(model.parameters()).dtype
    if quantized_layers(model):
        config.quantization_config = compressed_config(model, names=True)
    name = MODELING.removesuffix(".py")
    content = json.loads(config.to_json_string(use_diff=False)) | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": f"{name}.DeciLMForCausalLM", "AutoConfig": f"{name}.DeciLMConfig"},
        "block_configs": block_configs(model),
        "jointopt": spec,
    }
    (place / "config.json").write_text(json.dumps(content, indent=2))
    save_generation_config(model, place)
    from jointopt.rebuilding import decilm

    (place / MODELING).write_text(in_one_file(stand_ins, runtime, decilm))
    return transformers_snippet("AutoModelForCausalLM", place.name, True)
