"""LLaMA and its relatives of the same layout: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quant.errors import JointoptError
from search_spaces.family import (
    Block,
    Branch,
    Cache,
    Family,
    Layer,
    Link,
    Model,
    Part,
    Stream,
    Width,
    configure_blocks,
    example_text,
    has_module,
)
from search_spaces.stand_ins import SkipAttention, SkipBranch

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
CHANGING = ("dynamic", "longrope")
"""Rope types whose frequencies follow the length of the texts that a model runs on."""


def declare(model: Model) -> Family:
    """The declaration of a LLaMA-like model, with or without a head of any kind.

    Heads leave in whole KV groups: the query heads of a group with its key and value head (GQA, arXiv 2305.13245).
    """
    root = next((f"{base}." for base in ("model", "transformer") if has_module(model, f"{base}.layers")), "")
    config = model.config
    rotary = model.get_submodule(f"{root}rotary_emb")
    if rotary.inv_freq.dtype != torch.float32 or rotary.rope_type in CHANGING:
        # `model.to(bfloat16)` rounds the frequencies too, and a long text leaves its own behind; no checkpoint stores
        # them, a reload has those of the config in float32.
        replacement = type(rotary)(config).to(rotary.inv_freq.device)
        model.get_submodule(root.rstrip("."))._modules["rotary_emb"] = replacement
    head_dim = model.get_submodule(f"{root}layers.0.self_attn").head_dim
    if config.num_attention_heads % config.num_key_value_heads:
        raise JointoptError(
            f"model: its config's num_attention_heads is {config.num_attention_heads}, its num_key_value_heads "
            f"{config.num_key_value_heads}; allowed: a divisor"
        )
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    staying = _staying(getattr(config, "layer_types", None) or ())
    blocks, widths, layers, caches = [], [], [_embedding(model, root)], []
    links, readers, writers = [], [], [layers[0].path]
    for index in range(len(model.get_submodule(f"{root}layers"))):
        name, path = f"block{index}", f"{root}layers.{index}"
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        branches = [Branch("mlp", {f"{path}.post_attention_layernorm": nn.Identity, mlp: SkipBranch})]
        if not staying:
            branches.insert(0, Branch("attention", {f"{path}.input_layernorm": nn.Identity, attention: SkipAttention}))
        blocks.append(Block(name, path, branches=tuple(branches)))
        widths.append(_heads(name, attention, config.num_attention_heads, head_dim, heads_per_group))
        widths.append(_mlp(name, mlp, model.get_submodule(f"{mlp}.down_proj").in_features))
        layers.extend(_block_layers(name, attention, mlp))
        caches.append(Cache(f"{name}.cache", attention, f"{name}.heads", name, _window(config, index)))
        readers.append(Link(f"{path}.input_layernorm", tuple(f"{attention}.{m}_proj" for m in "qkv")))
        readers.append(Link(f"{path}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")))
        links.append(Link(f"{attention}.v_proj", (f"{attention}.o_proj",), head_dim, heads_per_group))
        links.append(Link(f"{mlp}.up_proj", (f"{mlp}.down_proj",)))
        writers += [f"{attention}.o_proj", f"{mlp}.down_proj"]
    if has_module(model, "lm_head") and not config.tie_word_embeddings:
        layers.append(Layer("head", "lm_head", "head"))
    for head in ("score", "classifier"):
        if has_module(model, head) and isinstance(model.get_submodule(head), nn.Linear):
            layers.append(Layer("head", head, "head"))
    last = next((h for h in ("lm_head", "score", "classifier") if has_module(model, h)), None)
    stream = None
    if last is not None and isinstance(model.get_submodule(last), nn.Linear):
        untie = _untie if layers[0].tied else None
        stream = Stream(tuple(writers), (*readers, Link(f"{root}norm", (last,))), untie=untie)
    links += readers
    return Family(
        "llama",
        tuple(blocks),
        tuple(widths),
        tuple(layers),
        _configure,
        example_text,
        tuple(caches),
        sequential=True,
        links=tuple(links),
        stream=stream,
        staying=staying,
    )


def _configure(model: Model, kept: Sequence[Block]) -> None:
    """As `configure_blocks`. transformers makes a cache for every block; one of a sliding window that no attention
    fills cannot be cropped, as assisted decoding does, unless it counts as another's (`kv_sharing_modes`). A model
    without any attention needs one cache that does not."""
    configure_blocks(model, kept)
    filled = sum(isinstance(getattr(module, "layer_idx", None), int) for module in model.modules())
    if 0 < filled < len(kept) and getattr(model.config, "sliding_window", None) is not None:
        model.config.kv_sharing_modes = [None] * filled + ["reuse"] * (len(kept) - filled)


def _window(config: Any, index: int) -> int | None:
    """That of a block's attention. Without a list of kinds all blocks slide (Mistral), or there is no window at all;
    Qwen2 and Qwen3 make the list from their `use_sliding_window` and `max_window_layers`."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[index] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def _staying(kinds: Sequence[str]) -> dict[str, str]:
    """Where only some attentions slide, transformers reads the kind of a cache by the number of its attention, that of
    a mask by the number of its block: an attention that leaves would set them apart."""
    if len(set(kinds)) < 2:
        return {}
    slide = [str(index) for index, kind in enumerate(kinds) if kind == "sliding_attention"]
    return {
        "attention": f"only blocks {', '.join(slide)} have attention over a sliding window (config.layer_types), and "
        "of such a mixture none can leave alone; allowed: keep, mlp_keep, depth"
    }


def _heads(block: str, attention: str, heads: int, head_dim: int, heads_per_group: int) -> Width:
    query_rows = head_dim * heads_per_group
    return Width(
        f"{block}.heads",
        "heads",
        heads,
        unit=heads_per_group,
        producers=(
            Part(f"{attention}.q_proj", query_rows),
            Part(f"{attention}.k_proj", head_dim),
            Part(f"{attention}.v_proj", head_dim),
        ),
        consumers=(Part(f"{attention}.o_proj", query_rows),),
        block=block,
        attention=True,
    )


def _mlp(block: str, mlp: str, size: int) -> Width:
    return Width(
        f"{block}.mlp",
        "mlp",
        size,
        producers=(Part(f"{mlp}.gate_proj"), Part(f"{mlp}.up_proj")),
        consumers=(Part(f"{mlp}.down_proj"),),
        attributes=((mlp, "intermediate_size", 1),),
        block=block,
    )


def _block_layers(block: str, attention: str, mlp: str) -> list[Layer]:
    groups = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "out"}
    layers = [
        Layer(f"{block}.{member}", f"{attention}.{member}_proj", f"{block}.{group}", block, "attention")
        for member, group in groups.items()
    ]
    groups = {"gate": "gate_up", "up": "gate_up", "down": "down"}
    layers += [
        Layer(f"{block}.{member}", f"{mlp}.{member}_proj", f"{block}.{group}", block, "mlp")
        for member, group in groups.items()
    ]
    return layers


def _untie(model: Model) -> None:
    """The embedding feeds the stream, the head reads it through the last normalization: rotated, they differ."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _embedding(model: Model, root: str) -> Layer:
    tied = ("lm_head",) if has_module(model, "lm_head") and model.config.tie_word_embeddings else ()
    return Layer("embedding", f"{root}embed_tokens", "embedding", tied=tied)
