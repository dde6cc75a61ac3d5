"""What a sampling strategy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from search_spaces.space import SearchSpace


class Sampling(Protocol):
    """Says what to train beside the largest sub-network, which every step trains on the task itself.

    Attributes:
        counts_steps: whether `progress` changes what is sampled, so that the number of steps must be known; False where
            a strategy of one's own does not say.
    """

    counts_steps: ClassVar[bool] = False

    def genomes(self, space: SearchSpace, progress: float, seed: int) -> Sequence[np.ndarray]:
        """The sub-networks of one step, each distilled from the largest.

        Args:
            progress: the share of all steps that is done, from 0 to below 1; 0 where nobody knows how many there are.
            seed: of this step; the same seed gives the same genomes.
        """
