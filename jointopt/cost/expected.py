"""A cost as a function of choice probabilities, with gradients (ProxylessNAS, arXiv 1812.00332, equation 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jointopt.cost.shapes import PARTS
from jointopt.cost.tables import keeping
from quant.errors import JointoptError
from search_spaces.family import within

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet


def expected_cost(supernet: Supernet, probabilities: Sequence[Tensor], measure: str) -> Tensor:
    """The expected value of an additive cost where each gene is drawn by itself.

    Exact for spaces of widths and formats: each module's cost depends on few genes, so that its expectation is a sum
    over their choices. Where blocks can leave, each module counts with the probability that its block stays.

    Args:
        probabilities: for each gene of the space a tensor [choices] that sums to 1.
        measure: "size", "macs", "bops", "parameters", "latency", "energy", "decode_latency", ...

    Returns:
        A scalar, float64, through which gradients reach the probabilities.

    Raises:
        JointoptError: an unknown measure, one that is no sum (peak_memory), probabilities of another shape.
    """
    tables = supernet.costs_by(supernet.latency)
    if measure not in tables.measures or measure in PARTS:
        allowed = ", ".join(name for name in tables.measures if name not in PARTS)
        raise JointoptError(f"expected_cost: found {measure!r}; allowed: {allowed}")
    genes = supernet.space.genes
    if any(np.isnan(table.values[measure]).any() for table in tables.tables):
        assert supernet.latency is not None  # all others have figures
        raise JointoptError(f"expected_cost: {supernet.latency.source} has no figure for {measure}")
    ordered = isinstance(probabilities, Iterable) and not isinstance(probabilities, Mapping)
    found = list(probabilities) if ordered else []
    if not found or not all(isinstance(each, Tensor) for each in found):
        raise JointoptError("expected_cost: found no tensors; allowed: one [choices] for each gene, in their order")
    if len(found) != len(genes):
        raise JointoptError(
            f"expected_cost: found {len(found)} tensors; allowed: one [choices] for each of {len(genes)} genes"
        )
    for each, gene in zip(found, genes, strict=True):
        if tuple(each.shape) != (len(gene.choices),):
            raise JointoptError(
                f"expected_cost: {gene.name}: found a tensor {list(each.shape)}; allowed: [{len(gene.choices)}]"
            )
    known = dict(zip(supernet.space.names, (each.double() for each in found), strict=True))
    by_index = list(known.values())
    kept = keeping(tables.family, tables.space, tables.leaving)
    total = torch.zeros((), dtype=torch.float64)
    for table in tables.tables:
        value = torch.as_tensor(table.values[measure], dtype=torch.float64)
        for index in reversed(table.genes):
            value = value @ by_index[index]
        total = total + value * _stays(table.path, kept, known)
    return total


def _stays(path: str, kept: Mapping[str, Mapping[str, np.ndarray]], known: Mapping[str, Tensor]) -> Tensor:
    """The probability that a module's block stays, and its branch."""
    found = torch.ones((), dtype=torch.float64)
    for parent, genes in kept.items():
        for gene, stays in genes.items() if within(path, parent) else ():
            found = found * (torch.as_tensor(stays, dtype=torch.float64) @ known[gene])
    return found
