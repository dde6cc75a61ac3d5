"""A cost as a function of choice probabilities, with gradients (ProxylessNAS, arXiv 1812.00332, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jointopt.cost.tables import PARTS
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
        sums = ", ".join(name for name in tables.measures if name not in PARTS)
        raise JointoptError(f"expected_cost: found {measure!r}; allowed: {sums}")
    if any(np.isnan(table.values[measure]).any() for table in tables.tables):
        assert supernet.latency is not None  # all others have figures
        raise JointoptError(f"expected_cost: {supernet.latency.source} has no figure for {measure}")
    names, given = supernet.space.names, list(probabilities)
    found, allowed = [tuple(np.shape(each)) for each in given], [(len(gene.choices),) for gene in supernet.space.genes]
    for name, shape, wanted in zip_longest(names, found, allowed, fillvalue="nothing"):
        if shape != wanted:
            raise JointoptError(f"expected_cost: {name}: found {shape}; allowed: {wanted}, one tensor a gene")
    known = {name: torch.as_tensor(each).double() for name, each in zip(names, given, strict=True)}
    by_index = list(known.values())
    total = torch.zeros((), dtype=torch.float64)
    for table in tables.tables:
        value = torch.as_tensor(table.values[measure], dtype=torch.float64)
        for index in reversed(table.genes):
            value = value @ by_index[index]
        total = total + value * _stays(table.path, tables.keeping, known)
    return total


def _stays(path: str, kept: Mapping[str, Mapping[str, np.ndarray]], known: Mapping[str, Tensor]) -> Tensor:
    """The probability that a module's block stays, and its branch."""
    found = torch.ones((), dtype=torch.float64)
    for parent, genes in kept.items():
        for gene, stays in genes.items() if within(path, parent) else ():
            found = found * (torch.as_tensor(stays, dtype=torch.float64) @ known[gene])
    return found
