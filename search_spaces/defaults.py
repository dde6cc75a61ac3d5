"""Derives a search space from a model: written-out choices, a preset, or a default in which all can be stored."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import yaml
from torch import nn

from quant.cache import by_bytes, cache_format, input_group
from quant.errors import JointoptError, check_choice, did_you_mean, said_of
from quant.formats import scheme
from search_spaces.checks import check_leaving
from search_spaces.families import Declare, declare
from search_spaces.family import Block, Family, Layer, Width, branch_keep
from search_spaces.precision import (
    PRECISION_PER,
    check_whole_model,
    columns_per_input,
    fitted_scheme,
    full_columns,
    gene_names,
    is_cache,
    is_precision,
    possible_columns,
)
from search_spaces.space import Gene, SearchSpace

DEFAULT_SCHEMES = ("none", "W8A8", "W4A16", "FP8_DYNAMIC")
KEEPS = ("keep", "attention_keep", "mlp_keep")
WIDTHS = ("heads", "mlp", "bottleneck", "stage")
ARCHITECTURE = ("depth", *KEEPS, *WIDTHS)


def presets() -> dict[str, dict[str, Any]]:
    """Name -> content of every preset that comes with the package."""
    folder = resources.files("search_spaces") / "presets"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): yaml.safe_load(f.read_text()) for f in files}


def space_for_model(
    model: nn.Module,
    schemes: Iterable[str] | None = None,
    precision_per: str | None = None,
    preset: str | None = None,
    caches: Iterable[str] | None = None,
    unquantized: Iterable[str] = (),
    family: Declare | None = None,
    **architecture: Any,
) -> SearchSpace:
    """The search space of a model.

    Args:
        model: any model of a known family, or of the one that `family` declares. It is left as it is.
        schemes: names of the number formats that every layer may choose from, where it can take them
            (default: none, W8A8, W4A16, FP8_DYNAMIC).
        precision_per: "layer", "projection" (q, k, v share a gene; gate, up share one; the default) or "block".
        preset: name of a file in search_spaces/presets; "fixed" leaves the architecture as it is.
        caches: names of the formats that the cache of each attention layer may choose from: none, INT8, INT4, FP8, FP4
            (of keys and values), X_INT8, X_INT4 (of the layer's input in their place). Left out, they stay as they are.
        unquantized: what keeps its numbers as they are, by the names that genes begin with: "embedding", "head",
            "block0", "block3.qkv".
        family: a declaration of one's own (model -> Family).
        **architecture: choices written out, which then are all that is elastic: depth, heads, mlp, bottleneck, stage
            (widths): lists of counts, or of fractions of the full one (floats), depth also of blocks less than
            all (0 or negative); keep, attention_keep, mlp_keep: True gives each block, its attention, its MLP a gene.
            None says nothing; False takes away what the preset says. With neither these nor a preset the space is the
            family's default.

    Returns:
        A space whose genes list their choices from small to large; precision choices come in the order of `schemes`,
        those of caches in the order of `caches`.

    Raises:
        JointoptError: an unknown key, preset or scheme; a width that does not divide; a scheme that fits no layer.
    """
    for name, given in (("schemes", schemes), ("caches", caches), ("unquantized", unquantized)):
        if isinstance(given, str):
            raise JointoptError(f"{name}: found {given!r}; allowed: a list of names")
    if schemes is not None and not (schemes := tuple(schemes)):
        raise JointoptError("schemes: found none; allowed: one or more, 'none' among them for unquantized layers")
    options = _options(preset, architecture)
    of_preset = options.pop("schemes", None), options.pop("precision_per", None)
    schemes = tuple(schemes or of_preset[0] or DEFAULT_SCHEMES)
    precision_per = precision_per or of_preset[1] or "projection"
    check_choice("precision_per", precision_per, PRECISION_PER)
    clone, declared = declare(model, family)
    chosen = options or (default_architecture(declared) if preset is None else {})
    genes = _depth_genes(declared, chosen) + _keep_genes(declared, chosen)
    widths = _width_genes(clone, declared, chosen, schemes, explicit=bool(options))
    genes += widths + _precision_genes(clone, declared, widths, schemes, precision_per, set(unquantized))
    genes += _cache_genes(clone, declared, caches)
    if not genes:
        raise JointoptError("space: nothing is elastic and no scheme is offered; give schemes, depth, heads, mlp, ...")
    check_leaving(declared, clone, [gene.name for gene in genes])
    requires = requirements(declared, {gene.name: gene.choices for gene in genes}, default_order(declared))
    return with_extremes(SearchSpace(genes).replaced(requires))


def with_extremes(space: SearchSpace) -> SearchSpace:
    """The space with its smallest and largest genomes by meaning: fewest and most channels, fewest and most bits."""
    ordered = [_by_size(gene) for gene in space.genes]
    return SearchSpace(space.genes, smallest=[each[0] for each in ordered], largest=[each[-1] for each in ordered])


def _by_size(gene: Gene) -> list[int]:
    """Choice indices from the smallest to the largest."""
    if is_precision(gene.name):
        return _by_bits(gene)
    return by_bytes(gene.choices) if is_cache(gene.name) else list(range(len(gene.choices)))


def _by_bits(gene: Gene) -> list[int]:
    """Choice indices from the fewest bits to the most; at equal weights the quantized activations come first."""

    def bits(index: int) -> tuple[float, float]:
        wanted = scheme(str(gene.choices[index]))
        return wanted.bits, 8.0 if wanted.activations else 16.0

    return sorted(range(len(gene.choices)), key=bits)


def _options(preset: str | None, architecture: Mapping[str, Any]) -> dict[str, Any]:
    for key in architecture:
        if key not in ARCHITECTURE:
            raise JointoptError(
                f"space.{key}: unknown key{did_you_mean(key, ARCHITECTURE)}; allowed: {', '.join(ARCHITECTURE)}"
            )
    architecture = {key: _without_numpy(given) for key, given in architecture.items()}
    given = {key: value for key, value in architecture.items() if value is not None}
    if preset is not None:
        known = presets()
        check_choice("space.preset", preset, known)
        given = {**(known[preset] or {}), **given}
    return {key: value for key, value in given.items() if value is not False}


def _without_numpy(given: Any) -> Any:
    """The same in Python's own numbers and lists."""
    if isinstance(given, np.ndarray | np.generic):
        return given.tolist()
    return [_without_numpy(each) for each in given] if isinstance(given, list | tuple) else given


def default_architecture(family: Family) -> dict[str, Any]:
    """What is elastic where nothing is said, as fractions of the full model."""
    if any(width.kind == "stage" for width in family.widths):
        return {"depth": [0.5, 0.75, 1.0], "bottleneck": [0.5, 0.75, 1.0], "stage": [0.75, 1.0]}
    return {"depth": [0.5, 0.67, 0.83, 1.0], "heads": [0.5, 0.75, 1.0], "mlp": [0.5, 0.75, 1.0]}


def _depth_genes(family: Family, chosen: Mapping[str, Any]) -> list[Gene]:
    if "depth" not in chosen:
        return []
    genes = []
    for stage, blocks in family.stages().items():
        full = len(blocks)
        least = max(1, sum(not block.removable for block in blocks))
        counts = sorted(
            {max(least, _count(f"space.depth ({stage})", c, full, least)) for c in _listed("depth", chosen)}
        )
        if counts != [full]:
            genes.append(Gene(stage, tuple(counts)))
    return genes


def _count(key: str, choice: Any, full: int, least: int) -> int:
    if isinstance(choice, float) and 0 < choice <= 1:
        return max(least, round(choice * full))
    if isinstance(choice, bool) or not isinstance(choice, int) or not -full < choice <= full:
        raise JointoptError(f"{key}: found {choice!r}; allowed: a count up to {full}, 0 or less, or a fraction (float)")
    if 0 < choice < least:
        raise JointoptError(f"{key}: found {choice!r}; allowed: {least} to {full}")
    return full + choice if choice <= 0 else choice


def _listed(key: str, chosen: Mapping[str, Any]) -> list[Any]:
    found = chosen[key]
    if not isinstance(found, list | tuple | range) or not len(found):
        raise JointoptError(f"space.{key}: found {found!r}; allowed: a list of counts or fractions")
    return list(found)


def _keep_genes(family: Family, chosen: Mapping[str, Any]) -> list[Gene]:
    genes, made = [], set[str]()
    for block in family.blocks:
        leaving = {"keep": block.keep} if block.removable else {}
        leaving |= {f"{branch.kind}_keep": branch_keep(block.name, branch.kind) for branch in block.branches}
        for key, gene in leaving.items():
            if chosen.get(key):
                genes.append(Gene(gene, (False, True)))
                made.add(key)
    for key in KEEPS:
        if chosen.get(key) and key not in made:
            never = f"the {family.name} family has no block that can leave this way"
            raise JointoptError(f"space.{key}: {family.staying.get(key.removesuffix('_keep'), never)}")
    return genes


def _width_genes(
    model: nn.Module, family: Family, chosen: Mapping[str, Any], schemes: tuple[str, ...], explicit: bool
) -> list[Gene]:
    genes: dict[str, Gene] = {}
    left: dict[str, set[int]] = {}
    kinds = {width.kind for width in family.widths}
    for key in WIDTHS:
        if key in chosen and key not in kinds and explicit:
            raise JointoptError(
                f"space.{key} (of the preset, where one is given): the {family.name} family has none; allowed: "
                f"{', '.join(sorted(kinds))}"
            )
    for width in family.widths:
        if width.kind not in chosen or width.gene in genes:
            continue
        sizes = sorted({_size(width, choice) for choice in _listed(width.kind, chosen)})
        kept = [size for size in sizes if size == width.size or _storable(model, family, width, size, schemes)]
        left.setdefault(width.kind, set()).update(set(sizes) - set(kept))
        if not kept:
            raise JointoptError(
                f"space.{width.kind} ({width.gene}): found {', '.join(map(str, sizes))}, at which a layer cannot take "
                f"all of {', '.join(schemes)}; allowed: others, or other schemes"
            )
        if kept != [width.size]:
            genes[width.gene] = Gene(width.gene, tuple(kept))
    for kind, without in left.items():
        if without and explicit:
            warnings.warn(
                f"space.{kind}: {', '.join(map(str, sorted(without)))} left out, at which a layer cannot take all of "
                f"{', '.join(schemes)}",
                stacklevel=4,
            )
    return list(genes.values())


def _size(width: Width, choice: Any) -> int:
    if isinstance(choice, float) and 0 < choice <= 1:
        grain = _grain(width)
        return min(width.size, max(grain, round(choice * width.size / grain) * grain))
    if isinstance(choice, bool) or not isinstance(choice, int) or not 0 < choice <= width.size or choice % width.unit:
        of = f" in steps of {width.unit}" if width.unit > 1 else ""
        raise JointoptError(
            f"space.{width.kind} ({width.gene}): found {choice!r}; allowed: {width.unit} to {width.size}{of}, "
            "or a fraction (float)"
        )
    return choice


def _grain(width: Width) -> int:
    """What fractions are rounded to: a step that divides the full width, and that groups of weights divide."""
    if width.kind == "heads":
        return width.unit
    return next((step for step in (128, 64, 32, 16, 8, 4, 2) if width.size % step == 0 and width.size >= 6 * step), 1)


def _storable(model: nn.Module, family: Family, width: Width, size: int, schemes: tuple[str, ...]) -> bool:
    """Whether each consumer can, at this size, take every scheme that it can take at full width."""
    for each in (w for w in family.widths if w.gene == width.gene):
        for part in each.consumers:
            module = model.get_submodule(part.module)
            layer = next((entry for entry in family.layers if entry.path == part.module), None)
            if layer is None:
                continue
            columns = size // each.unit * part.channels * columns_per_input(module)
            for name in schemes:
                if _fits(name, layer, module, [full_columns(module)]) and not _fits(name, layer, module, [columns]):
                    return False
    return True


def _fits(name: str, layer: Layer, module: nn.Module, columns: Collection[int]) -> bool:
    try:
        fitted_scheme(name, layer, module, columns)
    except JointoptError:
        return False
    return True


def _precision_genes(
    model: nn.Module,
    family: Family,
    widths: list[Gene],
    schemes: tuple[str, ...],
    precision_per: str,
    unquantized: set[str],
) -> list[Gene]:
    check_whole_model({"space.schemes": schemes}, model)
    named = {name for layer in family.layers for name in (layer.name, layer.projection, layer.block) if name}
    if any(layer.tied for layer in family.layers):
        named.add("head")
    for name in sorted(unquantized - named):
        near = did_you_mean(name, sorted(named))
        raise JointoptError(f"space.unquantized: found {name!r}{near}; allowed: names of layers, projections, blocks")
    choices = {gene.name: gene.choices for gene in widths}
    at = PRECISION_PER.index(precision_per)
    groups: dict[str, list[Layer]] = {}
    for layer in family.layers:
        if not unquantized & {layer.name, layer.projection, layer.block}:
            groups.setdefault(gene_names(layer)[at], []).append(layer)
    genes: list[Gene] = []
    unmet, left = set(schemes), list[str]()
    for gene, layers in groups.items():
        modules = [(layer, model.get_submodule(layer.path)) for layer in layers]
        sized = [(layer, module, possible_columns(family, layer, module, choices)) for layer, module in modules]
        offered = [name for name in schemes if all(_fits(name, *each) for each in sized)]
        unmet -= set(offered)
        if not offered:
            left.extend(layer.path for layer in layers)
        elif offered != ["none"]:
            genes.append(Gene(gene, tuple(offered)))
    if unmet:
        raise JointoptError(f"space.schemes: no layer of the model can take {', '.join(sorted(unmet))}")
    if left:
        warnings.warn(f"none of {', '.join(schemes)} fits {', '.join(left)}: left unquantized", stacklevel=4)
    return genes


def _cache_genes(model: nn.Module, family: Family, caches: Iterable[str] | None) -> list[Gene]:
    if caches is None:
        return []
    names = tuple(dict.fromkeys(caches))
    if not names:
        raise JointoptError("space.caches: found an empty list; allowed: one format or more")
    forms = [cache_format(name) for name in names]
    if not family.caches:
        raise JointoptError(f"space.caches: the {family.name} family has no cache; allowed: models that generate text")
    for cache in family.caches:
        if any(form.inputs for form in forms):
            with said_of(f"space.caches: {cache.attention}"):
                input_group(model.get_submodule(f"{cache.attention}.k_proj").get_parameter("weight").shape[1])
    return [Gene(cache.name, names) for cache in family.caches if names != ("none",)]


def default_order(family: Family) -> dict[str, list[str]]:
    """Depth gene -> its removable blocks in the order of leaving, before any importance is known: the last first."""
    return {
        stage: [block.name for block in reversed(blocks) if block.removable]
        for stage, blocks in family.stages().items()
    }


def requirements(
    family: Family, choices: Mapping[str, tuple], order: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, tuple]]:
    """What each gene requires in order to matter: that its block, and its part of the block, are there."""
    present = {block.name: _presence(block, family, choices, order) for block in family.blocks}
    found: dict[str, dict[str, tuple]] = {}
    for block in family.blocks:
        for branch in block.branches:
            found[branch_keep(block.name, branch.kind)] = present[block.name]
        depth = {k: v for k, v in present[block.name].items() if k != block.keep}
        found[block.keep] = depth
    for width in family.widths:
        if width.block:
            branch_kind = "attention" if width.attention else width.kind
            found[width.gene] = {**present[width.block], **_kept(branch_keep(width.block, branch_kind), choices)}
    for layer in family.layers:
        if layer.block is None:
            continue
        own = {**present[layer.block], **_kept(branch_keep(layer.block, layer.branch), choices)}
        for gene in gene_names(layer):
            found[gene] = own if found.get(gene, own) == own else present[layer.block]
    for cache in family.caches:
        found[cache.name] = {**present[cache.block], **_kept(branch_keep(cache.block, "attention"), choices)}
    return {gene: requires for gene, requires in found.items() if gene in choices}


def _kept(gene: str, choices: Mapping[str, tuple]) -> dict[str, tuple]:
    return {gene: (True,)} if gene in choices else {}


def _presence(
    block: Block, family: Family, choices: Mapping[str, tuple], order: Mapping[str, Sequence[str]]
) -> dict[str, tuple]:
    requires = _kept(block.keep, choices)
    if block.stage in choices and block.removable:
        counts = tuple(c for c in choices[block.stage] if block.name not in family.gone_at(block.stage, c, order))
        if len(counts) < len(choices[block.stage]):
            requires = {block.stage: counts, **requires}
    return requires
