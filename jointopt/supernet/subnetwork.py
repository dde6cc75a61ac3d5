"""Builds the sub-network that a genome names, as views into the super-network's tensors.

The view, the extracted model and what is exported come from the same lines: an extracted model is the view with its
tensors copied, an export writes the codes that the view's values stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jointopt.names import LEARNED_RANGES
from jointopt.rebuilding.held_cache import hold_cache
from jointopt.rebuilding.runtime import COLUMN_COUNTS, ROW_COUNTS
from jointopt.supernet.adapters import absorb
from jointopt.supernet.batch_norm import keep_statistics
from jointopt.supernet.range_factors import LearnedRanges
from jointopt.supernet.repair import Repaired
from jointopt.supernet.weight_bank import BankedWeight
from quant.cache import CacheFormat, input_group
from quant.errors import JointoptError
from quant.formats import Scheme
from quant.layers import as_quantized
from quant.learned_ranges import learn_range
from quant.reference import straight_through
from search_spaces.clones import LEFT, exchange, structural_clones, without_autocast
from search_spaces.family import Block, Branch, Cache, Family, Layer, within


@dataclass(frozen=True)
class Plan:
    """What a genome says, in the family's terms.

    Attributes:
        blocks: the blocks that stay, in the order of the forward pass.
        dropped: the branches that leave from blocks that stay.
        units: width gene -> number of units that stay; widths that are whole are not listed.
        schemes: path -> scheme of every layer that stays and is quantized.
        caches: path of an attention layer -> the format of its cache, where it is quantized.
    """

    blocks: tuple[Block, ...]
    dropped: tuple[Branch, ...] = ()
    units: Mapping[str, int] = field(default_factory=dict)
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    caches: Mapping[str, CacheFormat] = field(default_factory=dict)

    def cut(self, family: Family) -> bool:
        """Whether channels, heads or blocks leave."""
        return bool(self.units or self.dropped) or len(self.blocks) < len(family.blocks)

    def whole(self, family: Family) -> bool:
        """Whether this is the full, unquantized model."""
        return not (self.schemes or self.caches or self.cut(family))


Weights = Callable[[str, Scheme, int | None], BankedWeight]
"""(layer path, scheme, number of input channels or None for all) -> the fake-quantized weight, with all its rows."""

MeasuredConstants = Mapping[tuple[str, str], Mapping[str, Tensor]]
"""(layer path, scheme name) -> the constants of a static activation format, as attributes of the layer; likewise of an
attention layer and its cache's format, as buffers."""
Constants = Callable[[str, str], Mapping[str, Tensor]]
"""The same, as a function: without any of these it gives {}."""


@dataclass(frozen=True)
class Source:
    """What sub-networks are built from.

    Attributes:
        model, family: the whole model, and what it declares.
        repaired: (layer's path, number of its input channels) -> weight and bias in place of the slices.
        learned: factors of ranges, where some are trained.
    """

    model: nn.Module
    family: Family
    weights: Weights
    constants: Constants
    repaired: Mapping[tuple[str, int], Repaired]
    learned: LearnedRanges | None


def build(source: Source, plan: Plan, training: bool = False) -> nn.Module:
    """A module tree of its own whose tensors are leading slices of the model's, in eval mode.

    With `training` it is in training mode, in which modules keep the modes that they have in a model that is in it
    too; nothing is repaired, and slices keep their link to the whole parameters, so that gradients reach
    them: of a quantized weight straight through its rounding (Bengio et al., arXiv 1308.3432), or as the learned
    factors of ranges have it.
    """
    family = source.family
    modules, keepers = structural_clones(source.model)
    shell = modules[""]
    if not training:
        without_autocast(shell)
    shell._parameters.pop(LEARNED_RANGES, None)
    absorb(modules.values(), training)
    rows, columns = _cuts(family, plan)
    gone = _gone(family, plan)
    layers = {layer.path: layer for layer in family.layers}
    tied = {path for layer in family.layers for path in layer.tied}
    for path in {**rows, **columns, **plan.schemes}:
        if path in tied or _is_in(path, gone):
            continue
        module, cut = modules[path], (rows.get(path), columns.get(path))
        if not training and (path, columns.get(path)) in source.repaired:
            _give(module, source.repaired[path, columns[path]])
        if (scheme := plan.schemes.get(path)) is None:
            _cut(module, *cut, training)
        else:
            banked = source.weights(path, scheme, columns.get(path))
            quantize_tied(_holders(source, modules, layers[path], scheme, training), scheme, banked, *cut, training)
    _hold_caches(source, modules, plan)
    _count_units(family, modules, plan, gone)
    _drop(shell, family, plan, training)
    if keepers and gone:
        _forget(modules, keepers, plan, gone)
    _count_caches(modules, gone)
    if training and not plan.whole(family):
        keep_statistics(modules.values())
    family.configure(shell, plan.blocks)
    if "generation_config" in shell.__dict__:
        shell.__dict__["generation_config"] = copy.copy(shell.generation_config)
    if not (training and shell.training) and any(module.training != training for module in modules.values()):
        shell.train(training)
    return shell


def detach(shell: nn.Module) -> nn.Module:
    """Gives every tensor of a view storage of its own (once each, so that tied ones stay tied)."""
    copies: dict[int, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            made = tensor.detach().clone(memory_format=torch.contiguous_format)
            wanted = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if wanted else made
        return copies[id(tensor)]

    for module in shell.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = own(tensor)  # type: ignore[assignment]
    return shell


def _cuts(family: Family, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Module path -> rows that stay, and module path -> input channels that stay, where not all do."""
    rows, columns = {}, {}
    for width in family.widths:
        if width.gene in plan.units:
            units = plan.units[width.gene]
            rows.update({part.module: units * part.channels for part in width.producers})
            columns.update({part.module: units * part.channels for part in width.consumers})
    return rows, columns


def _gone(family: Family, plan: Plan) -> tuple[str, ...]:
    """Paths of the modules that leave with all that is in them."""
    kept = {block.name for block in plan.blocks}
    blocks = [block.path for block in family.blocks if block.name not in kept]
    return (*blocks, *(path for branch in plan.dropped for path in branch.replacements))


def _is_in(path: str, parents: Iterable[str]) -> bool:
    return any(within(path, parent) for parent in parents)


def _give(module: nn.Module, repaired: Repaired) -> None:
    """A repaired weight and bias in place of the whole ones."""
    for name, tensor in zip(("weight", "bias"), repaired, strict=True):
        if tensor is not None:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=module.get_parameter(name).requires_grad)


def _cut(module: nn.Module, rows: int | None, columns: int | None, training: bool) -> None:
    """Leading slices in place of a module's tensors."""
    by_column = isinstance(module, nn.Embedding)
    for store in (module._parameters, module._buffers):
        for name, tensor in list(store.items()):
            if tensor is None or not tensor.dim():
                continue
            view = tensor[:, :rows] if by_column else tensor[:rows]
            if name == "weight" and columns is not None:
                view = view[:, :columns]
            if store is module._buffers:
                module._buffers[name] = view.clone() if training else view
            elif training:
                del store[name]
                module.__dict__[name] = view
            else:
                store[name] = nn.Parameter(view.detach(), requires_grad=tensor.requires_grad)
    _set_sizes(module, rows, columns)


def _set_sizes(module: nn.Module, rows: int | None, columns: int | None) -> None:
    for size, names in ((rows, ROW_COUNTS), (columns, COLUMN_COUNTS)):
        for name in names:
            if size is not None and name in module.__dict__:
                module.__dict__[name] = size
    if rows is not None and "normalized_shape" in module.__dict__:
        module.__dict__["normalized_shape"] = (rows,)


def quantize_layer(
    module: nn.Module,
    scheme: Scheme,
    banked: BankedWeight,
    rows: int | None,
    columns: int | None,
    constants: Mapping[str, Tensor],
    training: bool = False,
) -> None:
    """The banked values in place of the weight, and the layer that quantizes its input in place of the stock one. With
    `training` the bias keeps its link to the whole one."""
    values = banked.values[:rows]
    if columns is not None:
        values = values[:, :columns]
    module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    bias = module._parameters.get("bias")
    if bias is not None and training:
        del module._parameters["bias"]
        module.__dict__["bias"] = bias[:rows]
    elif bias is not None and rows is not None:  # a whole one may be another module's too
        module._parameters["bias"] = nn.Parameter(bias.detach()[:rows], requires_grad=bias.requires_grad)
    _set_sizes(module, rows, columns)
    area = values[0, 0].numel() if values.dim() > 2 else 1
    as_quantized(module, scheme, banked.quantized.sliced(values.shape[0], values.shape[1] * area), constants)


class Holder(NamedTuple):
    """One of the modules that hold a weight.

    Attributes:
        constants: of a static format of its inputs.
        factor: of the range of the weight, where it is learned.
        input_factor: of the range of its inputs, where that is.
    """

    module: nn.Module
    constants: Mapping[str, Tensor]
    factor: Tensor | None = None
    input_factor: Tensor | None = None


def quantize_tied(
    holders: Sequence[Holder],
    scheme: Scheme,
    banked: BankedWeight,
    rows: int | None,
    columns: int | None,
    training: bool,
) -> None:
    """`quantize_layer` of a layer, the first of `holders`, and of those tied to it, of which none is ever cut. With
    `training` gradients go to the weight that each has, else they share one."""
    first = holders[0].module
    for module, constants, factor, input_factor in holders:
        whole = module._parameters["weight"]
        cut = (rows, columns) if module is first else (None, None)
        quantize_layer(module, scheme, banked, *cut, constants, training)
        if training and whole is not None:
            pass_gradients(module, whole, factor)
            module.__dict__["input_factor"] = input_factor
        elif module is not first:
            module._parameters["weight"] = first._parameters["weight"]


def pass_gradients(module: nn.Module, whole: Tensor, factor: Tensor | None) -> None:
    """Has the gradient of a quantized weight go to the whole weight of which it is a slice, and to the factor of
    its range where there is one."""
    values = module._parameters.pop("weight")
    assert values is not None
    part = whole[tuple(slice(size) for size in values.shape)]
    if factor is None:
        module.__dict__["weight"] = straight_through(part, values.detach())
    else:
        module.__dict__["weight"] = learn_range(part, values.detach(), module.__dict__["quantized"], factor)


def _hold_cache(attention: nn.Module, form: CacheFormat, constants: Mapping[str, Tensor]) -> None:
    """The attention layer on a cache in this format, with the constants of the heads that stay."""
    weight = attention.get_submodule("k_proj").get_parameter("weight")
    for name, tensor in constants.items():
        attention.register_buffer(name, tensor[: weight.shape[0] // tensor.shape[1]])
    group = input_group(weight.shape[1]) if form.inputs else None
    hold_cache(attention, {"element": form.element, "inputs": form.inputs, "group": group})


def _holders(
    source: Source, modules: Mapping[str, nn.Module], layer: Layer, scheme: Scheme, training: bool
) -> list[Holder]:
    """The layer and those tied to it."""
    ranges = source.learned if training else None
    return [
        Holder(
            modules[path],
            source.constants(path, scheme.name),
            ranges.factor(layer.path, scheme) if ranges else None,
            ranges.input_factor(path, scheme.name) if ranges else None,
        )
        for path in layer.paths
    ]


def _hold_caches(source: Source, modules: Mapping[str, nn.Module], plan: Plan) -> None:
    for path, form in plan.caches.items():
        of_keys = source.constants(path, form.name)
        if not form.inputs and not of_keys:
            raise JointoptError(f"{path}: {form.name} caches need ranges of keys; call calibrate(batches) first")
        _hold_cache(modules[path], form, of_keys)


def _count_units(family: Family, modules: Mapping[str, nn.Module], plan: Plan, gone: Sequence[str]) -> None:
    """The numbers of heads or channels that modules keep as attributes, of the units that stay."""
    for width in family.widths:
        for path, name, per_unit in width.attributes:
            if width.gene in plan.units and not _is_in(path, gone):
                setattr(modules[path], name, plan.units[width.gene] * per_unit)


def _drop(shell: nn.Module, family: Family, plan: Plan, training: bool) -> None:
    """Takes out branches and blocks; those that stay are counted anew in lists that others left, which are of blocks
    alone (`search_spaces.checks.check_leaving`)."""
    for branch in plan.dropped:
        for path, replacement in branch.replacements.items():
            holder, _, name = path.rpartition(".")
            shell.get_submodule(holder)._modules[name] = replacement().train(training)
    for blocks, kept in zip(family.stages().values(), _staying(family, plan), strict=True):
        if len(kept) < len(blocks):
            container = shell.get_submodule(blocks[0].path.rpartition(".")[0])
            modules = [container._modules[block.path.rpartition(".")[2]] for block in kept]
            container._modules = dict(zip(_names(kept), modules, strict=True))


def _forget(modules: Mapping[str, nn.Module], keepers: Iterable[nn.Module], plan: Plan, gone: Sequence[str]) -> None:
    """Takes what is gone out of the lists that modules keep beside torch's own; what stands in for a branch, in it."""
    others: dict[int, Any] = {id(module): LEFT for path, module in modules.items() if _is_in(path, gone)}
    for branch in plan.dropped:
        for path in branch.replacements:
            holder, _, name = path.rpartition(".")
            others[id(modules[path])] = modules[holder]._modules[name]
    exchange(keepers, others)


def _count_caches(modules: Mapping[str, nn.Module], gone: Sequence[str]) -> None:
    """The indices of KV caches, counted anew over those that are left where some are gone."""
    indexed = [(path, module) for path, module in modules.items() if isinstance(module.__dict__.get("layer_idx"), int)]
    left = [module.__dict__ for path, module in indexed if not _is_in(path, gone)]
    ranks = {index: rank for rank, index in enumerate(sorted({each["layer_idx"] for each in left}))}
    for each in left if len(left) < len(indexed) else ():
        each["layer_idx"] = ranks[each["layer_idx"]]


def renaming(family: Family, plan: Plan) -> Callable[[str], str]:
    """A module's path -> its path in the extracted model, where dropped blocks no longer count."""
    moved: dict[str, str] = {}
    for stage, kept in zip(family.stages().values(), _staying(family, plan), strict=True):
        for block, name in zip(kept, _names(kept), strict=True) if len(kept) < len(stage) else ():
            container, dot, _ = block.path.rpartition(".")
            moved[block.path] = f"{container}{dot}{name}"

    def renamed(path: str) -> str:
        parent = path
        while parent and parent not in moved:
            parent = parent.rpartition(".")[0]
        return moved[parent] + path[len(parent) :] if parent else path

    return renamed


def _staying(family: Family, plan: Plan) -> list[list[Block]]:
    """The blocks of each stage that stay."""
    names = {block.name for block in plan.blocks}
    return [[block for block in stage if block.name in names] for stage in family.stages().values()]


def _names(kept: Iterable[Block]) -> list[str]:
    """What the blocks that stay are called in their container: new indices, or their names where these are none."""
    before = [block.path.rpartition(".")[2] for block in kept]
    return [str(index) if name.isdecimal() else name for index, name in enumerate(before)]


def staying_caches(family: Family, plan: Plan) -> list[Cache]:
    """The caches of the attention layers that stay."""
    gone = _gone(family, plan)
    return [cache for cache in family.caches if not _is_in(cache.attention, gone)]


def staying_layers(family: Family, plan: Plan) -> list[Layer]:
    """The layers of the sub-network, in the family's order."""
    gone = _gone(family, plan)
    return [layer for layer in family.layers if not _is_in(layer.path, gone)]


def layout(shell: nn.Module, family: Family, plan: Plan) -> list[dict[str, Any]]:
    """One record a layer of a plan's sub-network: block, layer (path in the super-network), name (path in `shell`),
    kind, rows, columns, scheme, bits. For pictures and records."""
    records = []
    renamed = renaming(family, plan)
    for layer in staying_layers(family, plan):
        name = renamed(layer.path)
        module = shell.get_submodule(name)
        weight = module.get_parameter("weight")
        kept = plan.schemes.get(layer.path)
        records.append(
            {
                "block": layer.block,
                "layer": layer.path,
                "name": name,
                "kind": next(k for k in ("Linear", "Conv2d", "Embedding") if k in type(module).__name__),
                "rows": weight.shape[0],
                "columns": weight[0].numel(),
                "scheme": kept.name if kept else "none",
                "bits": kept.bits if kept and kept.weights else weight.element_size() * 8,
            }
        )
    return records
