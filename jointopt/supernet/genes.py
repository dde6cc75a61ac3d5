"""Matches a search space's genes to a model's declaration, by name, and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from jointopt.supernet.subnetwork import Plan, staying_caches, staying_layers
from quant.cache import CACHE_FORMATS
from quant.errors import JointoptError, did_you_mean
from quant.formats import Scheme
from search_spaces.checks import check_leaving
from search_spaces.family import Family, branch_keep
from search_spaces.precision import check_whole_model, fitted_scheme, gene_names, possible_columns
from search_spaces.space import Gene, SearchSpace


def precision_genes(family: Family, space: SearchSpace) -> dict[str, str]:
    """Layer path -> its precision gene: the first there is of its own, its projection group's, its block's."""
    names = set(space.names)
    found = {layer.path: next((g for g in gene_names(layer) if g in names), None) for layer in family.layers}
    return {path: gene for path, gene in found.items() if gene is not None}


def fitted_schemes(
    model: nn.Module, family: Family, space: SearchSpace, genes: dict[str, str]
) -> dict[tuple[str, str], Scheme]:
    """(layer path, choice) -> the scheme as that layer stores it, at every width that the space gives it."""
    choices = {gene.name: gene.choices for gene in space.genes}
    check_whole_model({gene: [str(choice) for choice in choices[gene]] for gene in genes.values()}, model)
    found = {}
    for layer in family.layers:
        if layer.path not in genes:
            continue
        module = model.get_submodule(layer.path)
        columns = possible_columns(family, layer, module, choices)
        for choice in choices[genes[layer.path]]:
            found[layer.path, str(choice)] = fitted_scheme(str(choice), layer, module, columns)
    return found


def check_space(model: nn.Module, family: Family, space: SearchSpace) -> None:
    """Raises JointoptError for a gene that nothing in the model answers to, a choice that the model lacks, or blocks
    that leave where they cannot be taken out."""
    widths = {width.gene: width for width in family.widths}
    depths = family.stages()
    keeps = {b.keep for b in family.blocks if b.removable}
    keeps |= {branch_keep(b.name, branch.kind) for b in family.blocks for branch in b.branches}
    precisions = {name for layer in family.layers for name in gene_names(layer)}
    caches = {cache.name for cache in family.caches}
    known = {*widths, *depths, *keeps, *precisions, *caches}
    for gene in space.genes:
        if gene.name not in known:
            raise JointoptError(
                f"gene {gene.name!r}: the {family.name} model has no such place{did_you_mean(gene.name, sorted(known))}"
            )
        if gene.name in widths:
            width = widths[gene.name]
            _check(
                gene,
                range(width.unit, width.size + 1, width.unit),
                f"{width.unit} to {width.size}, steps of {width.unit}",
            )
        elif gene.name in depths:
            blocks = depths[gene.name]
            least = max(1, sum(not block.removable for block in blocks))
            _check(gene, range(least, len(blocks) + 1), f"{least} to {len(blocks)} blocks")
        elif gene.name in keeps:
            _check(gene, (False, True), "False, True")
        elif gene.name in caches:
            _check(gene, tuple(CACHE_FORMATS), ", ".join(CACHE_FORMATS))
    check_leaving(family, model, space.names)


def _check(gene: Gene, allowed: range | tuple, said: str) -> None:
    for choice in gene.choices:
        if choice not in allowed:
            raise JointoptError(f"gene {gene.name!r}: found {choice!r}; allowed: {said}")


def plan_of(
    family: Family,
    chosen: Mapping[str, Any],
    leaving: Mapping[str, Sequence[str]],
    genes: Mapping[str, str],
    schemes: Mapping[tuple[str, str], Scheme],
) -> Plan:
    """What choices by gene say in the family's terms; what has no gene stays whole and unquantized.

    Args:
        chosen: gene -> choice, of a canonical genome.
        leaving: depth gene -> names of its blocks in the order of leaving.
        genes, schemes: see `precision_genes` and `fitted_schemes`.
    """
    blocks = []
    for stage, members in family.stages().items():
        gone = family.gone_at(stage, chosen.get(stage, len(members)), leaving)
        blocks += [b for b in members if b.name not in gone and chosen.get(b.keep, True)]
    blocks.sort(key=family.blocks.index)
    dropped = tuple(
        branch
        for block in blocks
        for branch in block.branches
        if not chosen.get(branch_keep(block.name, branch.kind), True)
    )
    widths = {width.gene: width for width in family.widths}
    units = {gene: chosen[gene] // width.unit for gene, width in widths.items() if gene in chosen}
    units = {gene: count for gene, count in units.items() if count < widths[gene].units}
    bare = Plan(tuple(blocks), dropped, units)
    offered = ((layer.path, genes[layer.path]) for layer in staying_layers(family, bare) if layer.path in genes)
    wanted = {path: schemes[path, chosen[gene]] for path, gene in offered}
    held = (cache for cache in staying_caches(family, bare) if cache.name in chosen)
    caches = {cache.attention: CACHE_FORMATS[chosen[cache.name]] for cache in held}
    return replace(
        bare,
        schemes={path: scheme for path, scheme in wanted.items() if scheme.weights is not None},
        caches={path: form for path, form in caches.items() if form.element is not None},
    )
