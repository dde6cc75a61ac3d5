"""Tables of costs that depend on a few genes each, and the costs of many genomes as sums of look-ups in them.

Every stored tensor and every product belongs to a module whose cost depends on few genes: the one of its rows, the one
of its columns, the one of its precision, and for a convolution's time those of what reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jointopt.cost.operators import LatencyModel
from jointopt.cost.positions import Positions
from jointopt.objectives import ENERGIES
from search_spaces.family import Family, branch_keep, within
from search_spaces.space import SearchSpace

PARTS = ("activation", "cached")
"""What `peak_memory` is made of beside the size, and nothing by itself."""


@dataclass(frozen=True)
class Table:
    """Cost of one module: measure -> array with an axis for each of the genes that it depends on, their choices."""

    path: str
    kind: str
    genes: tuple[int, ...]
    values: Mapping[str, np.ndarray]


class CostTables:
    """All tables of a super-network as one column of values a measure, in which a genome's value is one entry of each
    table.

    Args:
        leaving: depth gene -> names of its removable blocks in the order of leaving.
        latency: what answered for times and energies; None where they are left out.

    Attributes:
        measures: of each table.
        keeping: path of a block or branch that can leave -> gene -> for each of its choices, whether it lets that stay.
        positions: by which they were counted.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        family: Family,
        space: SearchSpace,
        leaving: Mapping[str, Sequence[str]],
        positions: Positions,
        latency: LatencyModel | None,
    ):
        self.tables, self.family, self.space = tables, family, space
        self.positions, self.latency = positions, latency
        self.measures = tuple(tables[0].values)
        self.keeping = _keeping(family, space, leaving)
        self._index = {name: i for i, name in enumerate(space.names)}
        # An entry is at `_first` + indices of its table's genes x `_strides`; tables of fewer genes have strides of 0.
        shape = len(tables), max(len(table.genes) for table in tables)
        self._genes, self._strides = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for at, table in enumerate(tables):
            sizes = table.values["macs"].shape
            self._genes[at, : len(sizes)] = table.genes
            self._strides[at, : len(sizes)] = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        entries = [table.values["macs"].size for table in tables]
        self._first = np.cumsum([0, *entries[:-1]])
        self._values = {m: np.concatenate([table.values[m].ravel() for table in tables]) for m in tables[0].values}
        self._inside = {p: np.array([within(table.path, p) for table in tables]) for p in self.keeping}
        self._latest: tuple[bytes, dict[str, np.ndarray]] | None = None

    def columns(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """Measure -> one value for each of `genomes` [n, genes], int64 (float64 for times, energies and bops, which can
        pass 2^63)."""
        asked = genomes.tobytes()
        if self._latest is None or asked != self._latest[0]:  # a search asks for one objective after the other
            self._latest = asked, self._columns(np.atleast_2d(genomes))
        return {measure: values.copy() for measure, values in self._latest[1].items()}

    def _columns(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        entries, present = self._entries(genomes)
        found = {}
        for measure, values in self._values.items():
            each = np.where(present, values[entries], 0)
            found[measure] = each.max(1) if measure == "activation" else each.sum(1)
        if self.latency is not None:
            found["peak_memory"] = found["size"] + found.pop("activation").astype(np.int64)
            if "cached" in found:
                found["peak_memory"] += found.pop("cached") * self.latency.batch
            for measure in ENERGIES:  # not every model of latency knows them
                if measure in found and np.isnan(found[measure]).any():
                    del found[measure]
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
        entries = self._first + (genomes[:, self._genes] * self._strides).sum(-1)
        present = np.ones(entries.shape, dtype=bool)
        for path, genes in self.keeping.items():
            for gene, stays in genes.items():
                there = stays[genomes[:, self._index[gene]]]
                if not there.all():
                    present[:, self._inside[path]] &= there[:, None]
        return entries, present


def _keeping(
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
