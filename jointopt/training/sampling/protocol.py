"""What a sampling strategy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from search_spaces.space import SearchSpace


class Sampling(Protocol):
    """Says what to train beside the largest sub-network, which every step trains on the task itself.

    One whose `progress` changes what is sampled has `counts_steps = True`: the number of steps must then be known.
    """

    def genomes(self, space: SearchSpace, progress: float, seed: int) -> Sequence[np.ndarray]:
        """The sub-networks of one step, each distilled from the largest.

        Args:
            progress: the share of all steps that is done, from 0 to below 1; 0 where nobody knows how many there are.
            seed: of this step; the same seed gives the same genomes.
        """
