"""Residual convolutional networks: ResNet of transformers and of timm, with basic and with bottleneck blocks.

A stage's width runs through its whole residual stream: every block's last convolution and the shortcut produce it,
every block's first convolution, the next stage and the classifier consume it. The last stage of a model without a head
is what it returns, and stays as wide as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from quant.errors import JointoptError
from search_spaces.family import (
    Block,
    Family,
    Layer,
    Link,
    Model,
    Part,
    Width,
    example_timm,
    has_module,
    own_config,
    unchanged,
)

MODEL_TYPES = ("resnet",)


@dataclass(frozen=True)
class _Names:
    """Where one library keeps a block's convolutions (each with its normalization and activation) and its shortcut."""

    path: str
    convolutions: tuple[tuple[str, str], ...]
    activations: tuple[str, ...]
    shortcut: tuple[str, str] | None


def declare(model: Model) -> Family:
    """The declaration of a transformers ResNet."""
    root = "resnet." if has_module(model, "resnet") else ""
    stages = []
    for stage in range(len(model.get_submodule(f"{root}encoder.stages"))):
        path = f"{root}encoder.stages.{stage}.layers"
        stages.append([_hf_block(model, f"{path}.{i}") for i in range(len(model.get_submodule(path)))])
    stem = (f"{root}embedder.embedder.convolution", f"{root}embedder.embedder.normalization")
    after_stem = (f"{root}embedder.embedder.activation", f"{root}embedder.pooler")
    return _family(model, "resnet", stages, stem, after_stem, "classifier.1", _configure, _example_image)


def _hf_block(model: Model, path: str) -> _Names:
    count = len(model.get_submodule(f"{path}.layer"))
    convolutions = tuple((f"{path}.layer.{i}.convolution", f"{path}.layer.{i}.normalization") for i in range(count))
    shortcut = (f"{path}.shortcut.convolution", f"{path}.shortcut.normalization")
    activations = tuple(f"{path}.layer.{i}.activation" for i in range(count))
    return _Names(path, convolutions, activations, shortcut if has_module(model, shortcut[0]) else None)


def _configure(model: Model, kept: Sequence[Block]) -> None:
    """A config of its own for the sub-network, with its depths."""
    config = own_config(model)
    config.depths = [sum(b.stage == f"stage{i + 1}.depth" for b in kept) for i in range(len(config.depths))]


def _example_image(model: Model) -> dict[str, Tensor]:
    return {"pixel_values": next(model.parameters()).new_zeros(1, model.config.num_channels, 224, 224)}


def declare_timm(model: Model) -> Family:
    """The declaration of a timm ResNet: plain or deep stem, ordinary convolutions, no attention in its blocks."""
    from timm.models.resnet import BasicBlock, Bottleneck

    stages = []
    for stage in (name for name, _ in model.named_children() if name.startswith("layer")):
        blocks: list[_Names] = []
        for index, block in enumerate(model.get_submodule(stage)):
            path = f"{stage}.{index}"
            if type(block) not in (BasicBlock, Bottleneck) or block.se is not None or type(block.aa) is not nn.Identity:
                raise JointoptError(
                    f"model: {path} has squeeze, attention or anti-aliasing; allowed: plain ResNet blocks"
                )
            grouped = [name for name, m in block.named_modules() if isinstance(m, nn.Conv2d) and m.groups != 1]
            if grouped:
                raise JointoptError(f"model: {path}.{grouped[0]} is a grouped convolution; allowed: groups=1")
            count = 2 if type(block) is BasicBlock else 3
            convolutions = tuple((f"{path}.conv{i}", f"{path}.bn{i}") for i in range(1, count + 1))
            activations = tuple(f"{path}.act{i}" for i in range(1, count + 1))
            blocks.append(_Names(path, convolutions, activations, _timm_pair(f"{path}.downsample", block.downsample)))
        stages.append(blocks)
    if model.global_pool.feat_mult() != 1:
        raise JointoptError(
            f"model: global_pool {model.global_pool.pool_type!r} hands each channel on twice, its parts far apart; "
            "allowed: avg, max, avgmax"
        )
    last = next(name for name, m in reversed(list(model.conv1.named_modules())) if isinstance(m, nn.Conv2d))
    stem = ("conv1" + (f".{last}" if last else ""), "bn1")
    attributes = (("", "num_features", 1), ("", "head_hidden_size", 1))
    shortcut = model.get_submodule(stages[0][0].path).downsample
    pools = [name for name, m in shortcut.named_children() if type(m) is not nn.Conv2d] if shortcut else []
    after_stem = ("act1", "maxpool", *(f"{stages[0][0].path}.downsample.{name}" for name in pools[:-1]))
    convolved = any(isinstance(m, nn.Conv2d) for m in model.maxpool.modules())  # timm's `replace_stem_pool`
    pool = _timm_pair("maxpool", model.maxpool) if convolved else None
    return _family(
        model, "timm_resnet", stages, stem, after_stem, "fc", example=example_timm, attributes=attributes, pool=pool
    )


def _timm_pair(path: str, module: nn.Module | None) -> tuple[str, str] | None:
    """The convolution and the normalization of what has just these, and perhaps a pool or an activation."""
    if module is None:
        return None
    paths = {type(m): f"{path}.{name}" for name, m in module.named_children()}
    norm = next((p for kind, p in paths.items() if issubclass(kind, nn.BatchNorm2d)), None)
    if nn.Conv2d not in paths or norm is None:
        found = ", ".join(kind.__name__ for kind in paths)
        raise JointoptError(f"model: {path} is of {found}; allowed: a Conv2d and a BatchNorm2d")
    return paths[nn.Conv2d], norm


def _family(
    model: Model,
    name: str,
    stages: list[list[_Names]],
    stem: tuple[str, str],
    after_stem: tuple[str, ...],
    head: str,
    configure: Any = unchanged,
    example: Any = None,
    attributes: tuple[tuple[str, str, int], ...] = (),
    pool: tuple[str, str] | None = None,
) -> Family:
    """
    Args:
        pool: the convolution that is in place of the stem's pool, and its normalization.
    """
    has_head = has_module(model, head) and isinstance(model.get_submodule(head), nn.Linear)
    blocks, widths, links = [], [], []
    first = stages[0][0]
    of_stem = (first.convolutions[0][0], first.shortcut[0]) if first.shortcut and _are_maxima(model, after_stem) else ()
    layers = [Layer("stem", stem[0], "stem", norm=stem[1], readers=of_stem)]
    if pool is not None:
        layers.append(Layer("stem.pool", pool[0], "stem.pool", norm=pool[1]))
    for number, stage in enumerate(stages, 1):
        following = stages[number] if number < len(stages) else None
        joined = (pool or stem) if number == 1 and stage[0].shortcut is None else None
        outer = _stage_width(model, f"stage{number}.width", stage, following, joined, head if has_head else None)
        if following is None:
            outer = replace(outer, attributes=attributes)
        if following is not None or has_head:
            widths.append(outer)
        for index, names in enumerate(stage):
            block = f"stage{number}.block{index}"
            blocks.append(Block(block, names.path, f"stage{number}.depth", removable=index > 0))
            widths.extend(_inner_widths(model, block, names))
            links.extend(_links(model, names))
            parts = {f"{block}.conv{i}": paths for i, paths in enumerate(names.convolutions, 1)}
            if names.shortcut:
                parts[f"{block}.shortcut"] = names.shortcut
            next_of = {
                before[0]: (after[0],)
                for before, after, activation in _neighbours(names)
                if _are_maxima(model, (activation,))
            }
            for part, (convolution, norm) in parts.items():
                readers = next_of.get(convolution, ())
                layers.append(Layer(part, convolution, part, block, norm=norm, readers=readers))
    if has_head:
        layers.append(Layer("head", head, "head", tokens=False))
    return Family(
        name,
        tuple(blocks),
        tuple(widths),
        tuple(layers),
        configure,
        example,
        links=tuple(links),
    )


def _neighbours(names: _Names) -> Iterator[tuple[tuple[str, str], tuple[str, str], str]]:
    """A block's convolutions, each with the next and the activation between them."""
    return zip(names.convolutions, names.convolutions[1:], names.activations, strict=False)


def _are_maxima(model: Model, paths: Sequence[str]) -> bool:
    """Whether these modules only ever hand on numbers that they are given, or 0."""
    return all(isinstance(model.get_submodule(path), nn.ReLU | nn.MaxPool2d | nn.Identity) for path in paths)


def _links(model: Model, names: _Names) -> list[Link]:
    """Between a block's convolutions: a ReLU hands on what its input is scaled by (Nagel et al., arXiv 1906.04721)."""
    return [
        Link(before[1], (after[0],))
        for before, after, activation in _neighbours(names)
        if isinstance(model.get_submodule(activation), nn.ReLU)
    ]


def _stage_width(
    model: Model,
    gene: str,
    stage: list[_Names],
    following: list[_Names] | None,
    stem: tuple[str, str] | None,
    head: str | None,
) -> Width:
    """The residual stream of one stage; `stem` where the first block adds the stem's output as it is."""
    if following is not None and following[0].shortcut is None:
        raise JointoptError(f"model: {following[0].path} has no shortcut layer, so two stages share one stream")
    produced = [*(stem or ())]
    consumed = []
    for index, names in enumerate(stage):
        produced += [*names.convolutions[-1], *(names.shortcut or ())]
        if index > 0 or stem:
            consumed.append(names.convolutions[0][0])
    if following is not None:
        consumed += [following[0].convolutions[0][0], following[0].shortcut[0]]  # type: ignore[index]
    size = model.get_submodule(stage[-1].convolutions[-1][0]).out_channels
    consumers = [Part(path) for path in consumed]
    if following is None and head is not None:
        consumers.append(Part(head, model.get_submodule(head).in_features // size))
    return Width(gene, "stage", size, tuple(Part(path) for path in produced), tuple(consumers))


def _inner_widths(model: Model, block: str, names: _Names) -> list[Width]:
    """The widths between a block's convolutions; all of a block share one gene, each is sorted on its own."""
    widths = []
    for before, after in zip(names.convolutions, names.convolutions[1:], strict=False):
        size = model.get_submodule(before[0]).out_channels
        parts = tuple(Part(path) for path in before)
        widths.append(Width(f"{block}.bottleneck", "bottleneck", size, parts, (Part(after[0]),), block=block))
    return widths
