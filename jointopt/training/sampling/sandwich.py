"""The sandwich rule: beside the largest sub-network the smallest and random ones (arXiv 1903.05134, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quant.errors import check_whole
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class Sandwich:
    """The smallest and `count` random sub-networks."""

    count: int = 2

    def __post_init__(self) -> None:
        check_whole("sandwich: count", self.count)

    def genomes(self, space: SearchSpace, progress: float, seed: int) -> list[np.ndarray]:
        return [space.smallest, *space.sample(self.count, seed)]
