"""BERT, and RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA, whose encoders have the same layout."""

from __future__ import annotations

from torch import nn

from quant.errors import JointoptError
from search_spaces.encoder import Encoder
from search_spaces.family import Branch, Family, Layer, Model, configure_blocks, example_text, has_module
from search_spaces.stand_ins import SkipPostNormAttention, SkipPostNormOutput

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")

# Layers behind the encoder, where the task puts them: path, whether a whole sequence of tokens comes in.
_HEADS = (
    ("pre_classifier", False),
    ("classifier", False),
    ("classifier.dense", False),
    ("classifier.out_proj", False),
    ("qa_outputs", True),
    ("cls.predictions.transform.dense", True),
    ("lm_head.dense", True),
    ("vocab_transform", True),
    ("generator_predictions.dense", True),
    ("discriminator_predictions.dense", True),
    ("discriminator_predictions.dense_prediction", True),
)


def declare(model: Model) -> Family:
    """The declaration of a BERT-like encoder under any head of transformers."""
    if model.config.is_decoder or getattr(model.config, "add_cross_attention", False):
        raise JointoptError("model: a BERT used as a decoder is not a known layout; allowed: encoders")
    check_head(model)
    root = next((f"{base}." for base in ("bert", "roberta", "electra") if has_module(model, base)), "")
    encoder = Encoder(model, [embedding_layer(model, root)])
    for index in range(len(model.get_submodule(f"{root}encoder.layer"))):
        path = f"{root}encoder.layer.{index}"
        attention = f"{path}.attention.self"
        module = model.get_submodule(attention)
        heads, head_dim = module.num_attention_heads, module.attention_head_size
        encoder.add(
            path,
            branches=(
                Branch("attention", {f"{path}.attention": SkipPostNormAttention}),
                Branch("mlp", {f"{path}.intermediate": nn.Identity, f"{path}.output": SkipPostNormOutput}),
            ),
            inputs=tuple(f"{attention}.{member}" for member in ("query", "key", "value")),
            out=f"{path}.attention.output.dense",
            up=f"{path}.intermediate.dense",
            down=f"{path}.output.dense",
            heads=heads,
            head_dim=head_dim,
            attributes=((attention, "num_attention_heads", 1), (attention, "all_head_size", head_dim)),
        )
    if has_module(model, f"{root}embeddings_project"):
        encoder.layers.append(Layer("project", f"{root}embeddings_project", "project"))
    if has_module(model, f"{root}pooler.dense"):
        encoder.layers.append(Layer("pooler", f"{root}pooler.dense", "pooler", tokens=False))
    encoder.layers.extend(head_layers(model))
    return encoder.family("bert", configure=configure_blocks, example=example_text)


def check_head(model: Model) -> None:
    """Raises JointoptError for a head that reads several texts a sample."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise JointoptError(
            "model: a head of multiple choice reads several texts a sample; allowed: heads that read one"
        )


def embedding_layer(model: Model, root: str) -> Layer:
    """The embedding of words under `root`, with the head that has its weight."""
    path = f"{root}embeddings.word_embeddings"
    weight = model.get_submodule(path).weight
    tied = tuple(
        other
        for other, module in model.named_modules()
        if other != path and isinstance(module, nn.Linear) and module.weight is weight
    )
    return Layer("embedding", path, "embedding", tied=tied)


def head_layers(model: Model) -> list[Layer]:
    """The layers behind the encoder."""
    per_token = "TokenClassification" in type(model).__name__
    heads = []
    for path, tokens in _HEADS:
        if has_module(model, path) and isinstance(model.get_submodule(path), nn.Linear):
            name = "head" if path in ("classifier", "qa_outputs") else "head." + path.rpartition(".")[2]
            heads.append(Layer(name, path, name, tokens=tokens or per_token))
    return heads
