"""Vision transformers: ViT and DeiT of transformers, VisionTransformer of timm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from quant.errors import JointoptError
from search_spaces.encoder import block_layers, heads_width, mlp_width
from search_spaces.family import (
    Block,
    Branch,
    Family,
    Layer,
    Link,
    Model,
    Stream,
    configure_blocks,
    example_timm,
    has_module,
)
from search_spaces.stand_ins import SkipAttention, SkipBranch, SplitQKV

MODEL_TYPES = ("vit", "deit")


def declare(model: Model) -> Family:
    """The declaration of a transformers ViT or DeiT under any head."""
    root = next((f"{base}." for base in MODEL_TYPES if has_module(model, base)), "")
    patches = f"{root}embeddings.patch_embeddings.projection"
    blocks, widths, layers = [], [], [Layer("embedding", patches, "embedding")]
    links, readers, writers = [], [], [patches]
    for index in range(len(model.get_submodule(f"{root}layers"))):
        name, path = f"block{index}", f"{root}layers.{index}"
        attention, mlp = f"{path}.attention", f"{path}.mlp"
        module = model.get_submodule(attention)
        blocks.append(
            Block(
                name,
                path,
                branches=(
                    Branch("attention", {f"{path}.layernorm_before": nn.Identity, attention: SkipAttention}),
                    Branch("mlp", {f"{path}.layernorm_after": nn.Identity, mlp: SkipBranch}),
                ),
            )
        )
        inputs = tuple(f"{attention}.{member}_proj" for member in "qkv")
        out, up, down = f"{attention}.o_proj", f"{mlp}.fc1", f"{mlp}.fc2"
        attributes = ((attention, "num_attention_heads", 1),)
        widths.append(heads_width(name, module.num_attention_heads, module.head_dim, inputs, out, attributes))
        widths.append(mlp_width(model, name, up, down))
        layers.extend(block_layers(name, inputs, out, up, down))
        readers += [Link(f"{path}.layernorm_before", inputs), Link(f"{path}.layernorm_after", (up,))]
        links.append(Link(inputs[2], (out,), module.head_dim))
        writers += [out, down]
    if has_module(model, f"{root}pooler.dense"):
        layers.append(Layer("pooler", f"{root}pooler.dense", "pooler", tokens=False))
    for path in ("classifier", "cls_classifier", "distillation_classifier"):
        if has_module(model, path) and isinstance(model.get_submodule(path), nn.Linear):
            name = "head" if path == "classifier" else "head." + path.partition("_")[0]
            layers.append(Layer(name, path, name, tokens=False))
    heads = tuple(layer.path for layer in layers if layer.block is None and "classifier" in layer.path)
    stream = None
    if heads and not has_module(model, f"{root}pooler"):
        added = ("cls_token", "distillation_token", "mask_token", "position_embeddings")
        constants = (f"{root}embeddings.{name}" for name in added)
        stream = _stream(model, writers, (*readers, Link(f"{root}layernorm", heads)), constants)
    links += readers
    return Family(
        "vit",
        tuple(blocks),
        tuple(widths),
        tuple(layers),
        configure_blocks,
        _example_image,
        sequential=True,
        links=tuple(links),
        stream=stream,
    )


def _stream(model: Model, writers: Iterable[str], readers: tuple[Link, ...], constants: Iterable[str]) -> Stream:
    there = dict(model.named_parameters())
    return Stream(tuple(writers), readers, tuple(path for path in constants if path in there))


def _example_image(model: Model) -> dict[str, Tensor]:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": next(model.parameters()).new_zeros(1, model.config.num_channels, height, width)}


def split_qkv(fused: nn.Linear) -> SplitQKV:
    """Three layers whose weights are views of `fused`'s."""
    split = SplitQKV(fused, "meta")  # where no random number is drawn
    for name in ("weight", "bias") if fused.bias is not None else ("weight",):
        whole = getattr(fused, name)
        for part, rows in zip((split.q, split.k, split.v), whole.detach().chunk(3), strict=True):
            setattr(part, name, nn.Parameter(rows, requires_grad=whole.requires_grad))
    return split


def declare_timm(model: Model) -> Family:
    """The declaration of a timm VisionTransformer; its qkv layers are split in place (see `SplitQKV`)."""
    from timm.layers import Attention, Mlp
    from timm.models.vision_transformer import Block as TimmBlock

    blocks, widths, layers = [], [], [Layer("embedding", "patch_embed.proj", "embedding")]
    links, readers, writers = [], [], ["patch_embed.proj"]
    for index, module in enumerate(model.blocks):
        name, path = f"block{index}", f"blocks.{index}"
        attention: Any = getattr(module, "attn", None)
        mlp: Any = getattr(module, "mlp", None)
        plain = type(module) is TimmBlock and type(attention) is Attention and type(mlp) is Mlp
        if not plain or attention.gate is not None or not _is_identity(attention.norm, mlp.norm):
            raise JointoptError(
                f"model: {path} is a {type(module).__name__} with {type(attention).__name__} and {type(mlp).__name__}; "
                "of timm's vision transformers those with plain blocks, ungated attention and no normalization within "
                "attention's output and MLP are known"
            )
        if isinstance(attention.qkv, nn.Linear):
            attention.qkv = split_qkv(attention.qkv)
        leaving = (_timm_branch("attention", path, "attn", 1), _timm_branch("mlp", path, "mlp", 2))
        blocks.append(Block(name, path, branches=leaving))
        inputs = tuple(f"{path}.attn.qkv.{member}" for member in "qkv")
        attributes = ((f"{path}.attn", "num_heads", 1), (f"{path}.attn", "attn_dim", attention.head_dim))
        out, up, down = f"{path}.attn.proj", f"{path}.mlp.fc1", f"{path}.mlp.fc2"
        widths.append(heads_width(name, attention.num_heads, attention.head_dim, inputs, out, attributes))
        widths.append(mlp_width(model, name, up, down))
        layers.extend(block_layers(name, inputs, out, up, down))
        readers += [Link(f"{path}.norm1", inputs), Link(f"{path}.norm2", (up,))]
        links.append(Link(inputs[2], (out,), attention.head_dim))
        writers += [out, down]
    if isinstance(model.head, nn.Linear):
        layers.append(Layer("head", "head", "head", tokens=False))
    links += readers
    return Family(
        "timm_vit",
        tuple(blocks),
        tuple(widths),
        tuple(layers),
        example=example_timm,
        sequential=True,
        links=tuple(links),
        stream=_timm_stream(model, writers, readers),
    )


def _timm_branch(kind: str, block: str, part: str, number: int) -> Branch:
    names = (f"norm{number}", part, f"ls{number}", f"drop_path{number}")
    return Branch(kind, {f"{block}.{name}": SkipBranch if name == part else nn.Identity for name in names})


def _is_identity(*modules: nn.Module) -> bool:
    return all(type(module) is nn.Identity for module in modules)


def _timm_stream(model: Model, writers: list[str], readers: list[Link]) -> Stream | None:
    """None where something else than normalizations reads the stream, or scales what is written to it."""
    last = [name for name in ("norm", "fc_norm") if isinstance(model.get_submodule(name), nn.LayerNorm)]
    between = [model.norm_pre, model.patch_embed.norm, *(getattr(b, n) for b in model.blocks for n in ("ls1", "ls2"))]
    plain = all(isinstance(module, nn.Identity) for module in between)
    if len(last) != 1 or not plain or not isinstance(model.head, nn.Linear) or model.global_pool == "map":
        return None
    return _stream(model, writers, (*readers, Link(last[0], ("head",))), ("cls_token", "reg_token", "pos_embed"))
