"""Random sub-networks alone, as InstaTune's ablation and single-path one-shot training have them (arXiv 1904.00420)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quant.errors import check_whole
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class Uniform:
    """`count` random sub-networks."""

    count: int = 3

    def __post_init__(self) -> None:
        check_whole("random: count", self.count)

    def genomes(self, space: SearchSpace, progress: float, seed: int) -> list[np.ndarray]:
        return list(space.sample(self.count, seed))
