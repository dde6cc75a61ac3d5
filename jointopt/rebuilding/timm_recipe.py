"""How timm builds a model of the layout of one that was extracted: what a reload calls, since timm has no config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from jointopt.rebuilding.structure import on_meta
from jointopt.rebuilding.timm_loading import build
from quant.errors import JointoptError


def by_timm(model: nn.Module) -> bool:
    """Whether timm builds it."""
    return type(model).__name__ in _RECIPES and type(model).__module__.startswith("timm.")


def by_library(model: nn.Module) -> bool:
    """Whether transformers or timm builds it."""
    return isinstance(model, PreTrainedModel) or by_timm(model)


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """Class and arguments by which timm builds a model of this layout, its dropped blocks not counted.

    Raises:
        JointoptError: the class is not known here.
    """
    name = type(model).__name__
    if not by_timm(model):
        raise JointoptError(
            f"export: no library loads a {name} again; allowed: models of transformers, timm's {', '.join(_RECIPES)}; "
            "target='onnxruntime'; supernet.extract(genome) gives the model itself"
        )
    return {"class": name, "arguments": _RECIPES[name](model)}


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model, which says how its images are prepared, as far as JSON holds it.

    timm leaves there what its own model had: size, means and deviations of three channels also where `in_chans` made
    it another number. Each of these is then given the mean of the three.
    """
    given = getattr(model, "pretrained_cfg", None) or {}
    told: dict[str, Any] = {
        k: v for k, v in given.items() if isinstance(v, str | int | float | bool | list | tuple | None)
    }
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    for name in ("mean", "std"):
        if told.get(name) and len(told[name]) != channels:
            told[name] = [sum(told[name]) / len(told[name])] * channels
    for name in ("input_size", "test_input_size"):
        if told.get(name):
            told[name] = [channels, *told[name][1:]]
    patches: Any = getattr(model, "patch_embed", None)
    if told and patches is not None and not model.dynamic_img_size:  # an image size of its own, which timm leaves out
        told["input_size"] = [channels, *patches.img_size]
    return told


_ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
"""timm's names of what a vision transformer may have in place of GELU."""


def _vision_transformer(model: Any) -> dict[str, Any]:
    head_dim = next((b.attn.head_dim for b in model.blocks if hasattr(b.attn, "head_dim")), model.embed_dim)
    hidden = max((block.mlp.fc1.out_features for block in model.blocks if hasattr(block.mlp, "fc1")), default=4)
    kinds = (type(block.mlp.act).__name__ for block in model.blocks if hasattr(block.mlp, "act"))
    scales = [scale for block in model.blocks for scale in (block.ls1, block.ls2) if hasattr(scale, "gamma")]
    return {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.embed_dim // head_dim,
        "mlp_ratio": hidden / model.embed_dim,
        "qkv_bias": any(
            getattr(m, "bias", None) is not None for n, m in model.named_modules() if n.endswith("attn.qkv.q")
        ),
        "qk_norm": any(not isinstance(m, nn.Identity) for n, m in model.named_modules() if n.endswith("attn.q_norm")),
        "init_values": 1e-5 if scales else None,
        "act_layer": _ACTIVATIONS.get(next(kinds, "")),
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
    }


def _resnet(model: Any) -> dict[str, Any]:
    stages = [stage for name, stage in model.named_children() if name.startswith("layer")]
    block = type(stages[0][0]).__name__
    expansion = stages[0][0].expansion
    last = "conv2" if block == "BasicBlock" else "conv3"
    deep = isinstance(model.conv1, nn.Sequential)
    widths = [model.conv1[i].out_channels for i in (0, 3)] if deep else []
    channels = [getattr(stage[0], last).out_channels // expansion for stage in stages]
    if stages[0][0].downsample is not None and channels[0] * expansion == (2 * widths[1] if deep else 64):
        channels[0] += 1  # else timm would build none; whatever it builds gets the model's own shapes
    return {
        "block": block,
        "layers": [len(stage) for stage in stages],
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "global_pool": model.global_pool.pool_type,
        "channels": channels,
        "stem_type": ("deep_tiered" if widths[0] != widths[1] else "deep") if deep else "",
        "stem_width": widths[1] if deep else 64,
        "replace_stem_pool": isinstance(model.maxpool, nn.Sequential),
        "avg_down": any(isinstance(m, nn.AvgPool2d) for stage in stages for m in stage.modules()),
    }


_RECIPES: dict[str, Callable[[Any], dict[str, Any]]] = {"VisionTransformer": _vision_transformer, "ResNet": _resnet}


def from_recipe(recipe: Mapping[str, Any]) -> nn.Module:
    """The model that a timm recipe describes, without storage."""
    return on_meta(build, recipe)
