"""DistilBERT: BERT's encoder with its layers in other places."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from search_spaces.bert import check_head, embedding_layer, head_layers
from search_spaces.encoder import block_layers, heads_width, mlp_width
from search_spaces.family import (
    Block,
    Branch,
    Family,
    Link,
    Model,
    configure_blocks,
    example_text,
    has_module,
)
from search_spaces.stand_ins import SkipAttention, SkipBranch

MODEL_TYPES = ("distilbert",)


def declare(model: Model) -> Family:
    """The declaration of a DistilBERT under any head of transformers."""
    check_head(model)
    root = "distilbert." if has_module(model, "distilbert") else ""
    blocks, widths, layers, links = [], [], [embedding_layer(model, root)], []
    for index in range(len(model.get_submodule(f"{root}transformer.layer"))):
        name, path = f"block{index}", f"{root}transformer.layer.{index}"
        attention, mlp = f"{path}.attention", f"{path}.ffn"
        blocks.append(
            Block(
                name,
                path,
                branches=(
                    Branch("attention", {attention: SkipAttention, f"{path}.sa_layer_norm": nn.Identity}),
                    Branch("mlp", {mlp: SkipBranch, f"{path}.output_layer_norm": nn.Identity}),
                ),
            )
        )
        module = model.get_submodule(attention)
        inputs = tuple(f"{attention}.{member}_lin" for member in "qkv")
        out, up, down = f"{attention}.out_lin", f"{mlp}.lin1", f"{mlp}.lin2"
        heads, head_dim = module.n_heads, module.attention_head_size
        attributes = ((attention, "n_heads", 1), (attention, "dim", head_dim))
        widths.append(heads_width(name, heads, head_dim, inputs, out, attributes))
        widths.append(mlp_width(model, name, up, down))
        layers.extend(block_layers(name, inputs, out, up, down))
        links.append(Link(inputs[2], (out,), head_dim))
    layers.extend(head_layers(model))
    return Family(
        "bert",
        tuple(blocks),
        tuple(widths),
        tuple(layers),
        _configure,
        example_text,
        sequential=True,
        links=tuple(links),
    )


def _configure(model: Model, kept: Sequence[Block]) -> None:
    configure_blocks(model, kept)
    encoder = next(module for name, module in model.named_modules() if name.split(".")[-1] == "transformer")
    encoder.n_layers = len(kept)
