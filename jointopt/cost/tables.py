"""Tables of costs that depend on a few genes each, and the costs of many genomes as sums of look-ups in them.

Every stored tensor and every product belongs to a module whose cost depends on five genes at most: the one of its
rows, the one of its columns, the one of its precision, and for a convolution's time those of one or two that read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_spaces.family import Family, branch_keep, within
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class Axis:
    """A gene that a module's cost depends on, and the number of channels at each of its choices; gene None: fixed."""

    gene: int | None
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """Cost of one module: measure -> array [row choices, column choices, precision choices, its two readers']."""

    path: str
    kind: str
    rows: Axis
    columns: Axis
    precision: int | None
    readers: tuple[int | None, int | None]
    values: Mapping[str, np.ndarray]


class Tables:
    """All tables of a super-network as one column of values a measure, in which a genome's value is one entry of each
    table.

    Args:
        leaving: depth gene -> names of its removable blocks in the order of leaving.
    """

    def __init__(
        self, tables: Sequence[Table], family: Family, space: SearchSpace, leaving: Mapping[str, Sequence[str]]
    ):
        self.tables = tables
        self._index = {name: i for i, name in enumerate(space.names)}
        # An entry is at `_first` + indices of its table's five genes x `_strides`; a gene that a table does not depend
        # on is the one past the last.
        genes, strides, first, entries = [], [], [], 0
        for table in tables:
            five = (table.rows.gene, table.columns.gene, table.precision, *table.readers)
            shape = table.values["macs"].shape
            genes.append([len(space) if gene is None else gene for gene in five])
            strides.append([math.prod(shape[axis + 1 :]) for axis in range(len(five))])
            first.append(entries)
            entries += math.prod(shape)
        self._genes, self._strides, self._first = np.array(genes), np.array(strides), np.array(first)
        self._values = {m: np.concatenate([table.values[m].ravel() for table in tables]) for m in tables[0].values}
        self._keeping = keeping(family, space, leaving)
        self._inside = {p: np.array([within(table.path, p) for table in tables]) for p in self._keeping}

    def columns(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """Measure -> one value for each of `genomes` [n, genes]: a sum, of "activation" the largest."""
        entries, present = self._entries(genomes)
        found = {}
        for measure, values in self._values.items():
            each = np.where(present, values[entries], 0)
            found[measure] = each.max(1) if measure == "activation" else each.sum(1)
        return found

    def breakdown(self, genome: np.ndarray) -> list[dict[str, Any]]:
        """Of each operator of one genome: its module's path, and its share of every measure."""
        entries, present = (each[0] for each in self._entries(np.atleast_2d(genome)))
        return [
            {"path": table.path, "kind": table.kind, **{m: v[entry].item() for m, v in self._values.items()}}
            for table, entry, there in zip(self.tables, entries, present, strict=True)
            if there
        ]

    def _entries(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each table's value of each genome is, and whether its module is in that genome: [n, tables] both."""
        padded = np.pad(genomes, ((0, 0), (0, 1)))
        entries = self._first + (padded[:, self._genes] * self._strides).sum(-1)
        present = np.ones(entries.shape, dtype=bool)
        for path, genes in self._keeping.items():
            for gene, stays in genes.items():
                there = stays[genomes[:, self._index[gene]]]
                if not there.all():
                    present[:, self._inside[path]] &= there[:, None]
        return entries, present


def keeping(
    family: Family, space: SearchSpace, leaving: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, np.ndarray]]:
    """Path of a block or branch that can leave -> gene -> for each of its choices, whether it lets that stay. It stays
    where all of its genes do."""
    choices = {gene.name: gene.choices for gene in space.genes}

    def switched(gene: str) -> dict[str, np.ndarray]:
        return {gene: np.array(choices[gene], dtype=bool)} if gene in choices else {}

    found = {}
    for block in family.blocks:
        found[block.path] = switched(block.keep)
        if block.removable and block.stage in choices:
            gone_at = [family.gone_at(block.stage, depth, leaving) for depth in choices[block.stage]]
            found[block.path][block.stage] = np.array([block.name not in gone for gone in gone_at])
        for branch in block.branches:
            found.update(dict.fromkeys(branch.replacements, switched(branch_keep(block.name, branch.kind))))
    return {path: genes for path, genes in found.items() if genes}
