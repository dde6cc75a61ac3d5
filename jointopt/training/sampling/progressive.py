"""Progressive shrinking: depth becomes elastic first, then width, then precision (Once-for-All, arXiv 1908.09791).

Once-for-All shrinks kernels, depth and width in turn, so that small sub-networks do not disturb the large ones before
these have learned. Here there are no kernels, and number formats come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from quant.errors import check_number, check_whole
from search_spaces.family import is_depth, is_keep
from search_spaces.precision import is_cache, is_precision
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class Progressive:
    """`count` random sub-networks and the smallest of those that are elastic so far.

    Attributes:
        width_from, precision_from: shares of the steps after which widths, and number formats, are sampled too.
    """

    counts_steps: ClassVar[bool] = True
    count: int = 2
    width_from: float = 0.33
    precision_from: float = 0.67

    def __post_init__(self) -> None:
        check_whole("progressive: count", self.count)
        check_number("progressive: width_from", self.width_from, 1)
        check_number("progressive: precision_from", self.precision_from, 1)

    def genomes(self, space: SearchSpace, progress: float, seed: int) -> list[np.ndarray]:
        elastic = np.array([progress >= self._begins(name) for name in space.names])
        genomes = np.stack([space.smallest, *space.sample(self.count, seed)])
        return list(space.canonical(np.where(elastic, genomes, space.largest)))

    def _begins(self, gene: str) -> float:
        if is_precision(gene) or is_cache(gene):
            return self.precision_from
        return 0.0 if is_depth(gene) or is_keep(gene) else self.width_from
