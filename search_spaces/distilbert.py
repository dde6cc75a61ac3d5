"""DistilBERT: BERT's encoder with its layers in other places."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from search_spaces.bert import check_head, embedding_layer, head_layers
from search_spaces.encoder import Encoder
from search_spaces.family import Block, Branch, Family, Model, configure_blocks, example_text, has_module
from search_spaces.stand_ins import SkipAttention, SkipBranch

MODEL_TYPES = ("distilbert",)


def declare(model: Model) -> Family:
    """The declaration of a DistilBERT under any head of transformers."""
    check_head(model)
    root = "distilbert." if has_module(model, "distilbert") else ""
    encoder = Encoder(model, [embedding_layer(model, root)])
    for index in range(len(model.get_submodule(f"{root}transformer.layer"))):
        path = f"{root}transformer.layer.{index}"
        attention, mlp = f"{path}.attention", f"{path}.ffn"
        module = model.get_submodule(attention)
        heads, head_dim = module.n_heads, module.attention_head_size
        encoder.add(
            path,
            branches=(
                Branch("attention", {attention: SkipAttention, f"{path}.sa_layer_norm": nn.Identity}),
                Branch("mlp", {mlp: SkipBranch, f"{path}.output_layer_norm": nn.Identity}),
            ),
            inputs=tuple(f"{attention}.{member}_lin" for member in "qkv"),
            out=f"{attention}.out_lin",
            up=f"{mlp}.lin1",
            down=f"{mlp}.lin2",
            heads=heads,
            head_dim=head_dim,
            attributes=((attention, "n_heads", 1), (attention, "dim", head_dim)),
        )
    encoder.layers.extend(head_layers(model))
    return encoder.family("bert", configure=_configure, example=example_text)


def _configure(model: Model, kept: Sequence[Block]) -> None:
    configure_blocks(model, kept)
    encoder = next(module for name, module in model.named_modules() if name.split(".")[-1] == "transformer")
    encoder.n_layers = len(kept)
