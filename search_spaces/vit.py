"""Vision transformers: ViT and DeiT of transformers, VisionTransformer of timm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from quant.errors import JointoptError
from search_spaces.encoder import Encoder
from search_spaces.family import Branch, Family, Layer, Link, Model, Stream, configure_blocks, example_timm, has_module
from search_spaces.stand_ins import SkipAttention, SkipBranch, SplitQKV

MODEL_TYPES = ("vit", "deit")


def declare(model: Model) -> Family:
    """The declaration of a transformers ViT or DeiT under any head."""
    root = next((f"{base}." for base in MODEL_TYPES if has_module(model, base)), "")
    patches = f"{root}embeddings.patch_embeddings.projection"
    encoder = Encoder(model, [Layer("embedding", patches, "embedding")], writers=[patches])
    for index in range(len(model.get_submodule(f"{root}layers"))):
        path = f"{root}layers.{index}"
        attention, mlp = f"{path}.attention", f"{path}.mlp"
        norms = f"{path}.layernorm_before", f"{path}.layernorm_after"
        module = model.get_submodule(attention)
        encoder.add(
            path,
            branches=(
                Branch("attention", {norms[0]: nn.Identity, attention: SkipAttention}),
                Branch("mlp", {norms[1]: nn.Identity, mlp: SkipBranch}),
            ),
            inputs=tuple(f"{attention}.{member}_proj" for member in "qkv"),
            out=f"{attention}.o_proj",
            up=f"{mlp}.fc1",
            down=f"{mlp}.fc2",
            heads=module.num_attention_heads,
            head_dim=module.head_dim,
            attributes=((attention, "num_attention_heads", 1),),
            norms=norms,
        )
    layers = encoder.layers
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
        stream = _stream(encoder, Link(f"{root}layernorm", heads), constants)
    return encoder.family("vit", configure=configure_blocks, example=_example_image, stream=stream)


def _stream(encoder: Encoder, last: Link, constants: Iterable[str]) -> Stream:
    there = dict(encoder.model.named_parameters())
    kept = tuple(path for path in constants if path in there)
    return Stream(tuple(encoder.writers), (*encoder.readers, last), kept)


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

    patches = "patch_embed.proj"
    encoder = Encoder(model, [Layer("embedding", patches, "embedding")], writers=[patches])
    for index, module in enumerate(model.blocks):
        path = f"blocks.{index}"
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
        encoder.add(
            path,
            branches=(_timm_branch("attention", path, "attn", 1), _timm_branch("mlp", path, "mlp", 2)),
            inputs=tuple(f"{path}.attn.qkv.{member}" for member in "qkv"),
            out=f"{path}.attn.proj",
            up=f"{path}.mlp.fc1",
            down=f"{path}.mlp.fc2",
            heads=attention.num_heads,
            head_dim=attention.head_dim,
            attributes=((f"{path}.attn", "num_heads", 1), (f"{path}.attn", "attn_dim", attention.head_dim)),
            norms=(f"{path}.norm1", f"{path}.norm2"),
        )
    if isinstance(model.head, nn.Linear):
        encoder.layers.append(Layer("head", "head", "head", tokens=False))
    return encoder.family("timm_vit", example=example_timm, stream=_timm_stream(encoder))


def _timm_branch(kind: str, block: str, part: str, number: int) -> Branch:
    names = (f"norm{number}", part, f"ls{number}", f"drop_path{number}")
    return Branch(kind, {f"{block}.{name}": SkipBranch if name == part else nn.Identity for name in names})


def _is_identity(*modules: nn.Module) -> bool:
    return all(type(module) is nn.Identity for module in modules)


def _timm_stream(encoder: Encoder) -> Stream | None:
    """None where something else than normalizations reads the stream, or scales what is written to it."""
    model = encoder.model
    last = [name for name in ("norm", "fc_norm") if isinstance(model.get_submodule(name), nn.LayerNorm)]
    between = [model.norm_pre, model.patch_embed.norm, *(getattr(b, n) for b in model.blocks for n in ("ls1", "ls2"))]
    plain = all(isinstance(module, nn.Identity) for module in between)
    if len(last) != 1 or not plain or not isinstance(model.head, nn.Linear) or model.global_pool == "map":
        return None
    return _stream(encoder, Link(last[0], ("head",)), ("cls_token", "reg_token", "pos_embed"))
