"""What all strategies share: what was asked, what was told, and a random stream that can be stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from jointopt.objectives import Constraint, Objective, minimized
from jointopt.strategies.feasible import Feasible
from quant.errors import JointoptError, check_whole
from search_spaces.space import SearchSpace


class Strategy:
    """Asks for genomes, is told their values. Subclasses have their own `propose`, and `learn` where needed.

    Args:
        constraints: limits to keep to. Exact ones every genome asked for keeps; measured ones
            steer "guided" and "evolutionary".

    Attributes:
        told, values: the genomes told and their values [n, objectives].
        predicted: for the last genomes asked, the values foreseen for them [n, objectives], NaN where none were.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        seed: int = 0,
        constraints: Sequence[Constraint] = (),
    ):
        self.space = space
        self.objectives = tuple(objectives)
        for objective in self.objectives:
            if objective.compute is not None:
                objective.check_alone(np.stack([space.smallest, space.largest]))
        self.feasible = Feasible(space, self.objectives, constraints)
        self.random = np.random.default_rng(seed)
        self.told = np.empty((0, len(space)), dtype=np.int64)
        self.values = np.empty((0, len(self.objectives)))
        self.predicted = np.empty((0, len(self.objectives)))
        self._seen: set[bytes] = set()

    def ask(self, n: int) -> np.ndarray:
        """Canonical genomes, int64 [n, genes], none of them asked or told before.

        Fewer than n, down to none, only where the space has no more that keep to the exact constraints; of more than
        a million genomes, where none of those differs in one gene from any known one that does.
        """
        check_whole("ask", n, 1)
        self.predicted = np.full((n, len(self.objectives)), np.nan)
        found = self._unseen(self.propose(n), n)
        if len(found) < n:
            found += self._fill(n - len(found), {genome.tobytes() for genome in found})
        self._seen |= {genome.tobytes() for genome in found}
        self.predicted = self.predicted[: len(found)]
        return np.array(found, dtype=np.int64).reshape(len(found), len(self.space))

    def tell(self, genomes: np.ndarray, values: np.ndarray) -> None:
        """Values [n, objectives] in the order of the objectives; a row with a NaN is a failure, to be avoided.

        Genomes need not have been asked for. One that is told again was measured anew: its earlier row is replaced.

        Raises:
            JointoptError: other shapes, genomes that are not of the space.
        """
        genomes = np.atleast_2d(self.space.canonical(genomes))
        values = self._shaped(values, len(genomes))
        rows = {genome.tobytes(): at for at, genome in enumerate(self.told)}
        told = np.array([rows.setdefault(genome.tobytes(), len(rows)) for genome in genomes], dtype=np.int64)
        self.told, self.values = _with_rows(self.told, told, genomes), _with_rows(self.values, told, values)
        self._seen |= rows.keys()
        self.learn(np.unique(told))

    def _shaped(self, values: np.ndarray, n: int) -> np.ndarray:
        expected = (n, len(self.objectives))
        try:
            found = np.asarray(values, dtype=float)
        except (TypeError, ValueError):
            raise JointoptError(f"tell: found values that are no numbers; allowed: floats {expected}") from None
        if found.ndim < 2 and found.size == expected[0] * expected[1] and 1 in expected:
            found = found.reshape(expected)
        if found.shape != expected:
            raise JointoptError(f"tell: found values of shape {found.shape}; allowed: {expected}")
        return found

    def propose(self, n: int) -> Iterable[np.ndarray]:
        """Genomes in order of preference, [genes] each. Repetitions, known ones and what is not canonical may be
        among them; what is missing is drawn at random."""
        return ()

    def learn(self, rows: np.ndarray) -> None:
        """What a strategy keeps beside `told` and `values`, of which these rows are new or replaced."""

    def costs(self) -> np.ndarray:
        """The told values, signs turned so that less is better."""
        return minimized(self.values, self.objectives)

    def _unseen(self, proposed: Iterable[np.ndarray], n: int) -> list[np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        if not isinstance(proposed, Iterable):
            raise JointoptError(f"{type(self).__name__}.propose: returned {proposed!r}; allowed: genomes")
        for each in proposed:
            genome = self.space.canonical(each)
            key = genome.tobytes()
            if key not in self._seen and not self.feasible.excess(genome[None])[0]:
                found.setdefault(key, genome)
            if len(found) == n:
                break
        return list(found.values())

    def _fill(self, n: int, besides: set[bytes]) -> list[np.ndarray]:
        """Random unseen genomes, moved to where they keep to the constraints; the whole space is gone through where
        drawing finds no more."""
        taken = self._seen | besides
        found: dict[bytes, np.ndarray] = {}
        for _ in range(50):
            before = len(found)
            drawn = self.space.sample(4 * n, int(self.random.integers(2**31)))
            for genome in self.feasible.repaired(drawn, self.random):
                if genome.tobytes() not in taken and len(found) < n:
                    found.setdefault(genome.tobytes(), genome)
            if len(found) == n:
                return list(found.values())
            if len(found) == before:
                break
        rest = self.space.genomes() if self.space.count() <= 10**6 else self._around(taken | found.keys())
        while len(found) < n and (some := list(islice(rest, 1000))):
            for genome in np.array(some)[self.feasible.excess(np.array(some)) == 0]:
                if genome.tobytes() not in taken and len(found) < n:
                    found.setdefault(genome.tobytes(), genome)
        return list(found.values())

    def _around(self, known: Iterable[bytes]) -> Iterator[np.ndarray]:
        """All that differ in one gene from a known genome that keeps to the exact constraints."""
        genomes = np.array([np.frombuffer(key, dtype=np.int64) for key in sorted(known)]).reshape(-1, len(self.space))
        genomes = genomes[self.feasible.excess(genomes) == 0]
        for genome in self.random.permutation(genomes):
            for gene, size in enumerate(self.space.sizes):
                changed = np.repeat(genome[None], size, axis=0)
                changed[:, gene] = np.arange(size)
                yield from self.space.canonical(changed)

    def state_dict(self) -> dict[str, Any]:
        """Everything that future asks depend on, as JSON can hold it."""
        waiting = self._seen - {genome.tobytes() for genome in self.told}
        asked = [np.frombuffer(key, dtype=np.int64).tolist() for key in sorted(waiting)]
        return {
            "random": self.random.bit_generator.state,
            "told": self.told.tolist(),
            "values": self.values.tolist(),
            "asked": asked,  # and not told
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.random.bit_generator.state = state["random"]
        self.told = np.array(state["told"], dtype=np.int64).reshape(-1, len(self.space))
        self.values = np.array(state["values"], dtype=float).reshape(-1, len(self.objectives))
        self._seen = {np.array(genome, dtype=np.int64).tobytes() for genome in [*state["told"], *state["asked"]]}


def _with_rows(known: np.ndarray, at: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`known` with rows replaced, or added where `at` is beyond its end."""
    grown = np.concatenate(
        [known, np.empty((max(0, int(at.max(initial=-1)) + 1 - len(known)), *known.shape[1:]), known.dtype)]
    )
    grown[at] = rows
    return grown
