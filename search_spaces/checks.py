"""Refuses, in one line, a declaration that does not fit the model, or that the mechanism cannot carry."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from types import FunctionType

from torch import nn

from quant.errors import JointoptError, check_count, check_kind, did_you_mean
from search_spaces.clones import keeping
from search_spaces.family import Block, Cache, Family, Layer, Link, Part, Width, extent, has_module, within

Holders = Mapping[int, Sequence[tuple[str, str]]]
"""Identity of a parameter -> path of each module that has it, and by which name."""


def check(family: Family, model: nn.Module) -> None:
    """Raises JointoptError where the declaration and the model disagree, naming the path and both sizes, or where the
    declaration contradicts itself."""
    _check_nouns(family)
    _check_names(family)
    for cache in family.caches:
        check_count(f"cache {cache.name!r}: window", cache.window)
    paths = [block.path for block in family.blocks] + [layer.path for layer in family.layers]
    paths += [path for block in family.blocks for branch in block.branches for path in branch.replacements]
    for path in paths + [cache.attention for cache in family.caches]:
        if not has_module(model, path):
            raise JointoptError(f"{family.name}: the declaration names {path!r}, which the model lacks")
    holders = _holders(model)
    _check_unshared(family, model, holders)
    _check_layers(family, model, holders)
    _check_forwards(family, model)
    _check_read_only(family, model)
    _check_kept(family, model)
    for width in family.widths:
        if width.size % width.unit:
            raise JointoptError(f"{width.gene}: {width.size} is not a whole number of units of {width.unit}")
        for part in width.producers:
            _check_part(family, model, width, part, "rows")
        for part in width.consumers:
            _check_part(family, model, width, part, "columns")
    for link in (*family.links, *(family.stream.readers if family.stream else ())):
        _check_link(family, model, link)


def check_leaving(family: Family, model: nn.Module, genes: Collection[str]) -> None:
    """Raises JointoptError where blocks, which leave by genes of these names, cannot be taken out as declared: the list
    that they leave is counted anew, and so has to hold the blocks of one depth gene, all of them and nothing else."""
    holders = _holders(model)
    for stage, blocks in family.stages().items():
        leaving = [block for block in blocks if block.removable and (stage in genes or block.keep in genes)]
        if leaving:
            _check_container(family, model, stage, blocks)
        for block in leaving:
            _check_alone(family, model, block, holders)


def _check_container(family: Family, model: nn.Module, stage: str, blocks: Sequence[Block]) -> None:
    path = blocks[0].path.rpartition(".")[0]
    named = f"{family.name}: blocks that {stage} counts may leave {path or 'the model itself'}"
    for block in blocks:
        if block.path.rpartition(".")[0] != path:
            raise JointoptError(f"{named}, and it counts {block.path} too; allowed: a Block(stage=) for each list")
    declared = [block.path.rpartition(".")[2] for block in blocks]
    found = list(model.get_submodule(path)._modules)
    undeclared = [name for name in found if name not in declared]
    if undeclared:
        raise JointoptError(
            f"{named}, whose {', '.join(undeclared)} it does not count; allowed: blocks in a list of their own, all of "
            "them, those that never leave as Block(..., removable=False)"
        )
    if declared != found:
        raise JointoptError(
            f"{named}, and are declared as {', '.join(declared)}; allowed: in its order, {', '.join(found)}"
        )


def _check_alone(family: Family, model: nn.Module, block: Block, holders: Holders) -> None:
    for path, parameter in model.get_submodule(block.path).named_parameters(block.path):
        others = [each for each, _ in holders[id(parameter)] if not within(each, block.path)]
        if others:
            raise JointoptError(
                f"{family.name}: {path} is also that of {', '.join(others)}, which stays where {block.name} leaves; "
                f"allowed: Block({block.name!r}, ..., removable=False), or tensors of its own"
            )


def _holders(model: nn.Module) -> Holders:
    found: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((path, name))
    return found


def _check_nouns(family: Family) -> None:
    nouns = {"blocks": Block, "widths": Width, "layers": Layer, "caches": Cache, "links": Link}
    for name, noun in nouns.items():
        entries = getattr(family, name)
        allowed = f"a tuple of {noun.__name__}s"
        check_kind(f"{family.name}: {name}", entries, (tuple, list), allowed)
        for each in entries:
            check_kind(f"{family.name}: {name}", each, noun, allowed)


def _check_names(family: Family) -> None:
    """That blocks are told apart, and that there is each block that something else names."""
    names, paths = [block.name for block in family.blocks], [block.path for block in family.blocks]
    for what, found in (("name", names), ("path", paths)):
        twice = next((each for each in found if found.count(each) > 1), None)
        if twice is not None:
            raise JointoptError(f"{family.name}: found two blocks of the {what} {twice!r}; allowed: one")
    named = [(f"layer {layer.path!r}", layer.block) for layer in family.layers]
    named += [(f"width {width.gene!r}", width.block) for width in family.widths]
    named += [(f"cache {cache.name!r}", cache.block) for cache in family.caches]
    for which, block in named:
        if block is not None and block not in names:
            raise JointoptError(
                f"{family.name}: {which} is declared to live in block {block!r}, which is not declared"
                f"{did_you_mean(block, names)}; allowed: the name of a Block, or None"
            )


def _check_unshared(family: Family, model: nn.Module, holders: Holders) -> None:
    """That what is sorted and cut is no other module's too."""
    carried = {part.module: width for width in family.widths for part in (*width.producers, *width.consumers)}
    for path, width in carried.items():
        own = model.get_submodule(path).parameters(recurse=False) if has_module(model, path) else ()
        others = {other for parameter in own for other, _ in holders[id(parameter)]} - {path}
        if others:
            raise JointoptError(
                f"{family.name}: {path}, which width {width.gene!r} names, shares a tensor with "
                f"{', '.join(sorted(others))}, where it would be sorted and cut too; allowed: tensors of its own, or "
                "leave the width out"
            )


def _check_forwards(family: Family, model: nn.Module) -> None:
    """That no forward pass is bound to modules of this model for good."""
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType) and forward.__closure__:
            raise JointoptError(
                f"{family.name}: {_joined(path, 'forward')} is a function that holds what it runs, as "
                "torch.compile(model.forward) makes one, and which no sub-network could have for its own; allowed: a "
                "method, or model.compile()"
            )


def _check_read_only(family: Family, model: nn.Module) -> None:
    """That no forward pass writes to the weights, which all sub-networks share."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise JointoptError(
                f"{family.name}: {path} has max_norm {module.max_norm}, by which each look-up writes to its weight; "
                "allowed: None, its rows scaled to that norm before"
            )


def _check_kept(family: Family, model: nn.Module) -> None:
    """Warns of a tensor that is cut or quantized where a module keeps it as it is."""
    paths = {part.module for width in family.widths for part in (*width.producers, *width.consumers)}
    paths |= {layer.path for layer in family.layers}
    changed = {id(each) for path in paths if has_module(model, path) for each in model.get_submodule(path).parameters()}
    for path, module in model.named_modules():
        if names := keeping(module, changed):
            warnings.warn(
                f"{family.name}: {_joined(path, names[0])} keeps a parameter of a layer; where the forward pass reads "
                "it there, sub-networks compute with it neither cut nor quantized",
                UserWarning,
                stacklevel=4,
            )


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_part(family: Family, model: nn.Module, width: Width, part: Part, side: str) -> None:
    if not has_module(model, part.module):
        raise JointoptError(f"{family.name}: width {width.gene!r} names {part.module!r}, which the model lacks")
    module = model.get_submodule(part.module)
    named = f"{family.name}: {part.module}, which width {width.gene!r} names, is a {type(module).__name__}"
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels
    grouped = getattr(module, "groups", 1) != 1
    if isinstance(module, nn.GroupNorm) or (grouped and not depthwise):
        raise JointoptError(
            f"{named} of groups, which are read together; allowed: one group, one for each channel, or leave the width "
            "out"
        )
    if grouped and (part.module, "groups") not in {each[:2] for each in width.attributes}:
        raise JointoptError(
            f"{named} of one group for each channel, and does not count its groups; allowed: "
            f"Width(..., attributes=(({part.module!r}, 'groups', {part.channels}),))"
        )
    found = extent(module, side)
    if found is None:
        allowed = "Linear, Conv2d"
        if side == "rows":
            allowed += ", Embedding, or what has one value for each channel in all its own tensors, as norms do"
        raise JointoptError(f"{named}, whose {side} cannot be cut; allowed: {allowed}")
    if found != width.units * part.channels:
        raise JointoptError(
            f"{family.name}: {part.module} has {found} {side}; width {width.gene!r} declares "
            f"{width.units} units of {part.channels}"
        )


def _check_layers(family: Family, model: nn.Module, holders: Holders) -> None:
    quantizable = {layer.path for layer in family.layers}
    for layer in family.layers:
        if len(layer.readers) > 2 or not quantizable.issuperset(layer.readers):
            raise JointoptError(
                f"{layer.path}: found readers {', '.join(layer.readers)}; allowed: paths of one or two declared layers"
            )
        module = model.get_submodule(layer.path)
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            raise JointoptError(
                f"{layer.path}: a {type(module).__module__}.{type(module).__name__} cannot be quantized; allowed: "
                "torch's Linear, Conv2d, Embedding (adapters are merged first)"
            )
        parent = layer.path.rpartition(".")[0]
        if parent and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
            raise JointoptError(
                f"{layer.path}: nn.MultiheadAttention reads its weight and never calls it, so that no input could be "
                "quantized; allowed: leave the layer out of the declaration"
            )
        weight = module._parameters.get("weight")
        if weight is None:
            raise JointoptError(
                f"{layer.path}: its weight is computed from others (a parametrization, pruning); allowed: a plain one, "
                "as torch.nn.utils.parametrize.remove_parametrizations and prune.remove leave it"
            )
        sharing = {path for path, name in holders[id(weight)] if name == "weight"}
        others = tuple(sorted(sharing - {*layer.paths}))
        if others:
            raise JointoptError(
                f"{layer.path}: its weight is also that of {', '.join(others)}, which the declaration does not say; "
                f"allowed: Layer(..., tied={others})"
            )
        stock = {kind.forward for kind in (nn.Linear, nn.Conv2d, nn.Embedding)}
        if type(module).forward not in stock or "forward" in module.__dict__:
            raise JointoptError(
                f"{layer.path}: {type(module).__name__} computes its output in its own way, which quantized would be "
                "lost; allowed: the forward of Linear, Conv2d, Embedding (leave the layer out of the declaration)"
            )


def _check_link(family: Family, model: nn.Module, link: Link) -> None:
    for path in (link.producer, *link.consumers):
        if not has_module(model, path):
            raise JointoptError(f"{family.name}: a link names {path!r}, which the model lacks")
        if model.get_submodule(path)._parameters.get("weight") is None:
            raise JointoptError(f"{family.name}: {path}, which a link names, has no weight that a scale could change")
    made = (extent(model.get_submodule(link.producer), "rows") or 0) * link.repeats
    for path in link.consumers:
        found = extent(model.get_submodule(path), "columns")
        if found != made or made % (link.head_dim or 1):
            raise JointoptError(
                f"{family.name}: {path} reads {found} channels; the link from {link.producer} has {made}"
            )
