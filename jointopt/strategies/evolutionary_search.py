"""NSGA-II on evaluated genomes (Deb et al., IEEE Trans. Evol. Comp. 6(2), 2002), with DEAP's selection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jointopt.objectives import Constraint, Objective
from jointopt.strategies.genetic import handicapped, offspring, order, select
from jointopt.strategies.strategy import Strategy
from search_spaces.space import SearchSpace


class EvolutionarySearch(Strategy):
    """A population of the best so far, from which children are bred.

    Args:
        population: its size; the first that many genomes are the smallest, the largest and random ones.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        seed: int = 0,
        constraints: Sequence[Constraint] = (),
        population: int = 50,
    ):
        super().__init__(space, objectives, seed, constraints)
        self.size = population
        self._members = np.empty(0, dtype=np.int64)

    def propose(self, n: int) -> Iterable[np.ndarray]:
        if len(self._seen) < self.size or len(self._members) < 2:
            yield from (self.space.largest, self.space.smallest)
            yield from self.space.sample(2 * n, int(self.random.integers(2**31)))
            return
        place = order(self._handicapped()[self._members])
        for _ in range(20):
            children = offspring(self.space, self.told[self._members], place, n, self.random)
            yield from self.feasible.repaired(children, self.random)

    def learn(self, rows: np.ndarray) -> None:
        costs = self._handicapped()
        pool = np.union1d(self._members, rows)
        pool = pool[np.isfinite(costs[pool]).all(axis=1)]
        if len(pool):
            self._members = pool[select(costs[pool], self.size)]

    def _handicapped(self) -> np.ndarray:
        return handicapped(self.costs(), self.feasible.measured_excess(self.values))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "members": self._members.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._members = np.array(state["members"], dtype=np.int64)
