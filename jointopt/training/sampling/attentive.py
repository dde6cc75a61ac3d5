"""The sandwich with its random sub-networks drawn where the user will choose (AttentiveNAS, arXiv 2011.09011).

AttentiveNAS draws several candidates under the same cost and trains the one that a predictor expects to be on the
front. Here a search that was run before stands in for the predictor: its front is trained, with some genes drawn anew
so that the front can move; and candidates beyond the region of interest are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jointopt.objectives import constraint, cost_and_unit
from quant.errors import JointoptError, check_number, check_whole
from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

TRIES = 64
"""Candidates from which one in the region is looked for; where none is, the nearest to it is taken."""


@dataclass(frozen=True)
class Attentive:
    """The smallest and `count` sub-networks of the region of interest.

    Attributes:
        front: genomes [n, genes] of a front, `np.stack(study.front()["genome"])`; None where there is no search yet.
        region: genomes [n, genes] -> how far each is beyond the region, 0 inside (`beyond_limits`); None for all.
        mutation: share of a front genome's genes that are drawn anew.
    """

    count: int = 2
    front: np.ndarray | None = None
    region: Callable[[np.ndarray], np.ndarray] | None = None
    mutation: float = 0.2

    def __post_init__(self) -> None:
        check_whole("attentive: count", self.count)
        check_number("attentive: mutation", self.mutation, 1)
        if self.region is not None and not callable(self.region):
            raise JointoptError(f"attentive: region: found {self.region!r}; allowed: a function of genomes")
        if self.front is not None and (np.ndim(self.front) != 2 or not len(self.front)):
            raise JointoptError(
                f"attentive: front: found shape {np.shape(self.front)}; allowed: (n, genes), one or more genomes such "
                "as np.stack(study.front()['genome'])"
            )

    def genomes(self, space: SearchSpace, progress: float, seed: int) -> list[np.ndarray]:
        if self.front is None and self.region is None:
            raise JointoptError("sampling attentive: found neither a front nor a region; allowed: one of them, or both")
        random = np.random.default_rng(seed)
        drawn = space.sample(self.count * TRIES, seed)
        if len(drawn) < self.count * TRIES:
            drawn = drawn[random.integers(len(drawn), size=self.count * TRIES)]
        if self.front is not None:
            front = np.asarray(self.front)
            space.validate(front)
            parents = front[random.integers(len(front), size=len(drawn))]
            drawn = space.canonical(np.where(random.random(drawn.shape) < self.mutation, drawn, parents))
        candidates = drawn.reshape(self.count, TRIES, len(space))
        if self.region is None:
            return [space.smallest, *candidates[:, 0]]
        beyond = np.asarray(self.region(drawn))
        if beyond.shape != (len(drawn),):
            raise JointoptError(
                f"attentive: region: returned shape {beyond.shape} for {len(drawn)} genomes; allowed: a number for each"
            )
        nearest = beyond.reshape(self.count, TRIES).argmin(1)
        return [space.smallest, *candidates[np.arange(self.count), nearest]]


def beyond_limits(supernet: Supernet, constraints: Mapping[str, str]) -> Callable[[np.ndarray], np.ndarray]:
    """The region within limits on costs, as `Attentive.region` takes it: the sum of what each is passed by, relative.

    Args:
        constraints: {"size_mb": "<= 20", "macs": "<= 1e9"}, as `jointopt.search` takes them; those on what is
            measured say nothing before a sub-network has run, and are left out.

    Raises:
        JointoptError: none is on a cost.
    """
    costs = supernet.original_costs()
    limits = []
    for name, text in constraints.items():
        cost, unit = cost_and_unit(name)
        if cost in costs:
            limits.append((cost, unit, constraint(name, text)))
    if not limits:
        raise JointoptError(f"sampling attentive: no constraint is on a cost; allowed: size_mb, {', '.join(costs)}")

    def beyond(genomes: np.ndarray) -> np.ndarray:
        columns = supernet.cost_columns(genomes)
        passed = [each.excess(columns[cost] / unit) / max(abs(each.limit), 1e-12) for cost, unit, each in limits]
        return np.sum(passed, axis=0)

    return beyond
