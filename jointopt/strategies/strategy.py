"""What all strategies share: what was asked, what was told, and a random stream that can be stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jointopt.objectives import Objective, minimized
from quant.errors import JointoptError
from search_spaces.space import SearchSpace


class Strategy:
    """Asks for genomes, is told their values. Subclasses say what to propose (`_propose`).

    Attributes:
        predicted: for the last genomes asked, the values foreseen for them [n, objectives], NaN where none were.
    """

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], seed: int):
        self.space = space
        self.objectives = tuple(objectives)
        self.random = np.random.default_rng(seed)
        self.told = np.empty((0, len(space)), dtype=np.int64)
        self.values = np.empty((0, len(self.objectives)))
        self.predicted = np.empty((0, len(self.objectives)))
        self._seen: set[bytes] = set()

    def ask(self, n: int) -> np.ndarray:
        """Canonical genomes, int64 [n, genes], none of them asked or told before.

        Fewer than n, down to none, only where the space has no more.
        """
        if n < 1:
            raise JointoptError(f"ask: found {n}; allowed: 1 or more")
        self.predicted = np.full((n, len(self.objectives)), np.nan)
        found = self._unseen(self._propose(n), n)
        if len(found) < n:
            found += self._fill(n - len(found), {genome.tobytes() for genome in found})
        self._seen |= {genome.tobytes() for genome in found}
        self.predicted = self.predicted[: len(found)]
        return np.array(found, dtype=np.int64).reshape(len(found), len(self.space))

    def tell(self, genomes: np.ndarray, values: np.ndarray) -> None:
        """Values [n, objectives] in the order of the objectives; a row with a NaN is a failure, to be avoided.

        Genomes need not have been asked for.
        """
        genomes = np.atleast_2d(self.space.canonical(genomes))
        expected = (len(genomes), len(self.objectives))
        try:
            values = np.asarray(values, dtype=float)
        except (TypeError, ValueError):
            raise JointoptError(f"tell: found values that are no numbers; allowed: floats {expected}") from None
        if values.ndim < 2 and values.size == expected[0] * expected[1] and 1 in expected:
            values = values.reshape(expected)
        if values.shape != expected:
            raise JointoptError(f"tell: found values of shape {values.shape}; allowed: {expected}")
        self.told = np.vstack([self.told, genomes])
        self.values = np.vstack([self.values, values])
        self._seen |= {genome.tobytes() for genome in genomes}
        self._learn(genomes, values)

    def _propose(self, n: int) -> Iterable[np.ndarray]:
        """Genomes in order of preference, repetitions and known ones allowed."""
        return ()

    def _learn(self, genomes: np.ndarray, values: np.ndarray) -> None:
        """What a strategy keeps beside `told` and `values`."""

    def costs(self) -> np.ndarray:
        """The told values, signs turned so that less is better."""
        return minimized(self.values, self.objectives)

    def _unseen(self, proposed: Iterable[np.ndarray], n: int) -> list[np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        for genome in proposed:
            key = genome.tobytes()
            if key not in self._seen:
                found.setdefault(key, genome)
            if len(found) == n:
                break
        return list(found.values())

    def _fill(self, n: int, besides: set[bytes]) -> list[np.ndarray]:
        """Random unseen genomes; the whole space is gone through where drawing finds no more."""
        taken = self._seen | besides
        found: dict[bytes, np.ndarray] = {}
        for _ in range(50):
            for genome in self.space.sample(4 * n, int(self.random.integers(2**31))):
                if genome.tobytes() not in taken and len(found) < n:
                    found.setdefault(genome.tobytes(), genome)
            if len(found) == n:
                return list(found.values())
        if self.space.count() <= 10**6:
            for genome in self.space.genomes():
                if genome.tobytes() not in taken and len(found) < n:
                    found.setdefault(genome.tobytes(), genome)
        return list(found.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that future asks depend on, as JSON can hold it."""
        asked = [np.frombuffer(key, dtype=np.int64).tolist() for key in sorted(self._seen)]
        return {
            "random": self.random.bit_generator.state,
            "told": self.told.tolist(),
            "values": self.values.tolist(),
            "asked": asked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.random.bit_generator.state = state["random"]
        self.told = np.array(state["told"], dtype=np.int64).reshape(-1, len(self.space))
        self.values = np.array(state["values"], dtype=float).reshape(-1, len(self.objectives))
        self._seen = {np.array(genome, dtype=np.int64).tobytes() for genome in state["asked"]}
