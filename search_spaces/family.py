"""What a family declares: where a model's blocks are, which layers carry each elastic width, which can be quantized.

A declaration is data. It names modules by their paths in the model, so that one mechanism (`jointopt.Supernet`) can
cut, drop and quantize any model that someone has described with the nouns of this file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.clones import is_plain

Model = Any
"""A torch.nn.Module with the attributes of its own class (config, blocks), which no type here can name."""


@dataclass(frozen=True)
class Part:
    """One module's share of an elastic width: `channels` consecutive rows (or input columns) for each unit."""

    module: str
    channels: int = 1


@dataclass(frozen=True)
class Width:
    """An elastic width: `size` heads or channels, leaving in whole units of `unit`.

    Attributes:
        gene: name of the gene that chooses it. Several widths may share one gene; each is sorted on its own.
        kind: "heads", "mlp", "bottleneck" or "stage": the key under which a config lists its choices.
        size: the full width, in what the gene counts (query heads, channels).
        unit: what leaves together, in the same count: one channel, or the query heads of one KV group.
        producers: modules whose output rows (weight, bias, normalization) carry the width, with the rows per unit.
        consumers: modules whose input columns carry it, with the columns per unit.
        attributes: (module path, attribute, value per unit): integers that the modules' forward passes read.
        block: name of the block it lives in, None for a width that runs through several.
        attention: True where the consumers' input is the output of attention, whose products count as MACs.
    """

    gene: str
    kind: str
    size: int
    producers: tuple[Part, ...]
    consumers: tuple[Part, ...]
    unit: int = 1
    attributes: tuple[tuple[str, str, int], ...] = ()
    block: str | None = None
    attention: bool = False

    @property
    def units(self) -> int:
        return self.size // self.unit


@dataclass(frozen=True)
class Branch:
    """A part of a block that can leave alone ("attention" or "mlp"): module path -> what stands in for it."""

    kind: str
    replacements: Mapping[str, Callable[[], nn.Module]]


@dataclass(frozen=True)
class Block:
    """A residual block. Where blocks leave, by a depth or a keep gene, their list holds nothing else than the blocks of
    one stage, all declared in their order, and the forward pass runs through it; elsewhere they may be anywhere.

    Attributes:
        name: short name, the first part of its genes' names ("block3", "stage2.block1").
        path: the module's path; its last component is its index in the list, or its name in a ModuleDict.
        stage: name of the depth gene that counts it ("depth", "stage2.depth").
        removable: False where the residual stream changes its shape, or the block shall stay.
        branches: what can leave alone.
    """

    name: str
    path: str
    stage: str = "depth"
    removable: bool = True
    branches: tuple[Branch, ...] = ()

    @property
    def keep(self) -> str:
        """Name of the gene that says whether it stays, where it has one of its own."""
        return f"{self.name}.keep"


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized: Linear, Conv2d or Embedding.

    Attributes:
        name: short name, and with ".precision" its own gene's name.
        path: the module's path.
        projection: name of the group that shares a precision gene (q, k, v; gate, up); the same for all of a group.
        block: the block it lives in, None outside the blocks.
        branch: the branch of the block that it leaves with ("attention", "mlp"), if any.
        tied: paths of other modules that hold the same weight.
        tokens: False where the layer's input is one vector a sample: no scheme with activations is offered there,
            since a dynamic scale would be shared by the whole batch.
        norm: path of the batch normalization that alone reads its output, if any.
        readers: of a convolution, paths of the layers that alone read its output, through a batch normalization, a ReLU
            and a maximum pooling at most; one or two.
    """

    name: str
    path: str
    projection: str
    block: str | None = None
    branch: str | None = None
    tied: tuple[str, ...] = ()
    tokens: bool = True
    norm: str | None = None
    readers: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Its own, and those of all that hold its weight."""
        return (self.path, *self.tied)


@dataclass(frozen=True)
class Cache:
    """The cache of one attention layer, which can be quantized: keys and values of earlier tokens, or its input.

    Attributes:
        name: short name, and its gene's name.
        attention: the module's path; it is handed the cache, and has `k_proj` and `v_proj`.
        heads: gene of the width that its heads leave with.
        block: the block it lives in.
        window: tokens that a token's attention meets, itself included; of the earlier ones the cache holds no others.
            None for all.
    """

    name: str
    attention: str
    heads: str
    block: str
    window: int | None = None

    def held(self, tokens: float) -> float:
        """Of so many earlier tokens, how many the cache holds."""
        return tokens if self.window is None else min(tokens, self.window - 1)


@dataclass(frozen=True)
class Link:
    """Channels that one module makes and others read, with nothing between them that a positive scale of each channel
    would not pass through: so that a scale may move from the one into the others.

    Attributes:
        producer: a normalization, whose weight and bias carry the channels, or a layer, whose output rows do.
        consumers: all that reads them: layers, as input columns.
        head_dim: channels in a head, where heads are only ever summed on their way (values, into attention's output):
            then they may also be rotated among themselves.
        repeats: how many query heads read each head of the producer (GQA).
    """

    producer: str
    consumers: tuple[str, ...]
    head_dim: int | None = None
    repeats: int = 1

    def read(self, channels: int) -> Tensor:
        """Index of the producer's channel that each input column of a consumer reads, [channels x repeats]."""
        heads = torch.arange(channels).reshape(-1, 1, self.head_dim or 1)
        return heads.expand(-1, self.repeats, -1).flatten()


@dataclass(frozen=True)
class Stream:
    """A residual stream that is read through normalizations alone, so that it may be rotated: one of constant width.

    Attributes:
        writers: layers whose output rows (an embedding's columns) add to it.
        readers: each normalization (an RMSNorm, or a LayerNorm) with all that reads it, the last one too.
        constants: paths of parameters that add to it, channels last: position embeddings, class tokens.
        untie: gives the last reader a weight of its own where it shares the embedding's; None where none is shared.
    """

    writers: tuple[str, ...]
    readers: tuple[Link, ...]
    constants: tuple[str, ...] = ()
    untie: Callable[[nn.Module], None] | None = None


def within(path: str, parent: str) -> bool:
    """Whether the module at `path` is the one at `parent` or inside it."""
    return path == parent or path.startswith(f"{parent}.")


def branch_keep(block: str, branch: str | None) -> str:
    """Name of the gene that says whether a block's branch stays."""
    return f"{block}.{branch}.keep"


def is_depth(gene: str) -> bool:
    """Whether a gene of this name counts blocks."""
    return gene.endswith("depth")


def is_keep(gene: str) -> bool:
    """Whether a gene of this name says of one block, or of a branch of it, that it stays."""
    return gene.endswith(".keep")


def unchanged(model: nn.Module, kept: Sequence[Block]) -> None:
    """The default `Family.configure`: a model whose forward pass reads no count of blocks."""


@dataclass(frozen=True)
class Family:
    """A model, described. See `Width`, `Block`, `Layer`.

    Attributes:
        name: "vit", "bert", "llama", "resnet", "timm_vit", "timm_resnet", or the name of a user's own.
        configure: called with a sub-network and the blocks it kept; sets what the forward pass reads (a new config).
        example: model -> keyword inputs of one sample, to measure shapes before any data is there.
        caches: of models that generate text.
        sequential: True where the blocks run one after the other with nothing in between, and hand on nothing but the
            hidden state: sub-networks that agree on their first blocks can then share what these compute.
        links: where scales of channels may move (SmoothQuant, AWQ), and which heads may be rotated.
        stream: the residual stream, where it may be rotated.
        staying: kind of branch that leaves alone in others of the family and not in this model -> why.
    """

    name: str
    blocks: tuple[Block, ...]
    widths: tuple[Width, ...]
    layers: tuple[Layer, ...]
    configure: Callable[[nn.Module, Sequence[Block]], None] = unchanged
    example: Callable[[nn.Module], dict[str, Tensor]] | None = None
    caches: tuple[Cache, ...] = ()
    sequential: bool = False
    links: tuple[Link, ...] = ()
    stream: Stream | None = None
    staying: Mapping[str, str] = field(default_factory=dict)

    def stages(self) -> dict[str, tuple[Block, ...]]:
        """Depth gene -> its blocks, in the order of the forward pass."""
        names = dict.fromkeys(block.stage for block in self.blocks)
        return {name: tuple(block for block in self.blocks if block.stage == name) for name in names}

    def gone_at(self, stage: str, depth: int, leaving: Mapping[str, Sequence[str]]) -> Sequence[str]:
        """Names of the stage's blocks that are not there where `depth` of them are: the first of `leaving[stage]`."""
        total = sum(block.stage == stage for block in self.blocks)
        return leaving[stage][: max(0, total - depth)]


def has_module(root: nn.Module, path: str) -> bool:
    """Whether there is a module at `path`; an attribute that is None counts as none."""
    module: Any = root
    for name in path.split("."):
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return False
    return True


def extent(module: nn.Module, side: str) -> int | None:
    """Number of a layer's output "rows" or input "columns", conv columns counted in channels, or of the channels (rows)
    of a normalization; None where there are none that could be cut."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        weight = module._parameters.get("weight")
        if weight is None or (side == "columns" and isinstance(module, nn.Embedding)):
            return None
        return weight.shape[1 if side == "columns" or isinstance(module, nn.Embedding) else 0]
    if side == "columns":
        return None
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    shapes = {tuple(tensor.shape) for tensor in tensors if tensor.dim()}
    if not shapes and "num_features" in vars(module):
        shapes = {(vars(module)["num_features"],)}
    if not shapes and "normalized_shape" in vars(module):
        shapes = {tuple(vars(module)["normalized_shape"])}
    shape = shapes.pop() if len(shapes) == 1 else ()
    return shape[0] if len(shape) == 1 else None


def example_text(model: Model) -> dict[str, Tensor]:
    """Token inputs of one sample: 128 tokens, or as many as the model takes."""
    length = min(128, getattr(model.config, "max_position_embeddings", 128) - 2)
    device = next(model.parameters()).device
    return {"input_ids": torch.ones(1, length, dtype=torch.long, device=device)}


def example_timm(model: Model) -> dict[str, Tensor]:
    """One black image of the model's own input size, 224 x 224 where it does not tell."""
    patches = getattr(model, "patch_embed", None)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    configured = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
    size = tuple(patches.img_size) if patches is not None else tuple(configured)[1:]
    return {"x": first.weight.new_zeros(1, first.in_channels, *size)}


def configure_blocks(model: Model, kept: Sequence[Block]) -> None:
    """A config of its own for the sub-network, with the kept blocks counted and the rest of it unchanged."""
    config = own_config(model)
    indices = [int(block.path.rpartition(".")[2]) for block in kept]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in indices]
    config.num_hidden_layers = len(indices)


def own_config(model: Model) -> Any:
    """A copy of the model's config, which its modules have from then on."""
    whole = model.config
    config = copy.copy(whole)
    # Half the time of copy.deepcopy(whole), which asks every number how it is copied.
    config.__dict__.update({name: copy.deepcopy(value) for name, value in vars(whole).items() if not is_plain(value)})
    for module in model.modules():
        if module.__dict__.get("config") is whole:
            module.__dict__["config"] = config
    return config


def own_settings(model: Model) -> None:
    """Copies of all that configures a model and its modules, which they have from then on."""
    copied: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            if name in module.__dict__:
                module.__dict__[name] = copy.deepcopy(module.__dict__[name], copied)
