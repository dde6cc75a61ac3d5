"""Search guided by predictors: LINAS (arXiv 2205.10358) with a better start and a better choice of what to evaluate.

An initial design along the diagonal from the smallest to the largest; predictors learned from all evaluations; an
inner NSGA-II on the predictions; of what it finds, those unseen genomes that add most hypervolume to the predicted
front are evaluated. Objectives that can be computed are never predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jointopt.objectives import Objective, hypervolume, minimized, non_dominated
from jointopt.predictors import Predictor, features
from jointopt.strategies.genetic import evolve, offspring, order
from jointopt.strategies.strategy import Strategy
from search_spaces.space import SearchSpace


class GuidedSearch(Strategy):
    """Evaluates what the predictors foresee as the front.

    Args:
        initial: number of genomes in the initial design.
        population: of the inner search.
        generations: of the inner search.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        seed: int = 0,
        initial: int = 30,
        population: int = 100,
        generations: int = 50,
    ):
        super().__init__(space, objectives, seed)
        self.initial, self.population, self.generations = initial, population, generations

    def _propose(self, n: int) -> Iterable[np.ndarray]:
        known = np.atleast_1d(np.isfinite(self.values).all(axis=1))
        if len(self._seen) < self.initial or known.sum() < 5:
            yield from self._design(n)
            return
        foresee = self._learned(known)
        costs = self.costs()[known]
        start = self.told[known][order(costs)[: self.population]]
        found, foreseen = self._inner_search(start, foresee)
        unseen = np.array([genome.tobytes() not in self._seen for genome in found], dtype=bool)
        found, foreseen = found[unseen], foreseen[unseen]
        picked = self._greedy(foreseen, costs, n)
        signs = np.array([objective.sign for objective in self.objectives])
        self.predicted[: len(picked)] = foreseen[picked] * signs
        yield from found[picked]

    def _design(self, n: int) -> Iterable[np.ndarray]:
        """The two ends, then genomes at levels in between: each gene near its level's place between its ends."""
        yield from (self.space.largest, self.space.smallest)
        for _ in range(20 * n):
            yield self._strewn(self.random.random())

    def _strewn(self, level: float) -> np.ndarray:
        genome = np.empty(len(self.space), dtype=np.int64)
        first, last = self.space.smallest, self.space.largest
        noise = np.clip(level + self.random.normal(0, 0.25, len(self.space)), 0, 1 - 1e-9)
        for at, size in enumerate(self.space.sizes):
            between = [i for i in range(size) if i not in (first[at], last[at])]
            ends = [int(first[at]), *between, int(last[at])] if first[at] != last[at] else [int(first[at]), *between]
            genome[at] = ends[int(noise[at] * len(ends))]
        return self.space.canonical(genome)

    def _learned(self, known: np.ndarray):
        """Genomes -> foreseen costs [n, objectives], less is better."""
        computed = self._computed(self.told)
        self._center, self._spread = computed.mean(0), np.maximum(computed.std(0), 1e-12)
        inputs = features(self.space, self.told, (computed - self._center) / self._spread)[known]
        predictors = {
            at: Predictor(inputs, self.values[known, at])
            for at, objective in enumerate(self.objectives)
            if objective.compute is None
        }

        def foresee(genomes: np.ndarray) -> np.ndarray:
            exact = self._computed(genomes)
            inputs = features(self.space, genomes, (exact - self._center) / self._spread)
            values = np.empty((len(genomes), len(self.objectives)))
            column = 0
            for at in range(len(self.objectives)):
                if at in predictors:
                    values[:, at] = predictors[at](inputs)
                else:
                    values[:, at] = exact[:, column]
                    column += 1
            return minimized(values, self.objectives)

        return foresee

    def _computed(self, genomes: np.ndarray) -> np.ndarray:
        columns = [np.asarray(o.compute(genomes), dtype=float) for o in self.objectives if o.compute is not None]
        return np.stack(columns, axis=1) if columns else np.empty((len(genomes), 0))

    def _inner_search(self, start: np.ndarray, foresee) -> tuple[np.ndarray, np.ndarray]:
        population = [*start[: self.population // 2]]
        population += list(self._design(self.population))[: self.population - len(population)]
        found, foreseen = evolve(self.space, np.array(population), foresee, self.generations, self.random)
        near = offspring(self.space, found, order(foreseen), 2 * self.population, self.random)
        merged = np.vstack([found, near])
        costs = np.vstack([foreseen, foresee(near)])
        _, distinct = np.unique(merged, axis=0, return_index=True)
        return merged[distinct], costs[distinct]

    def _greedy(self, foreseen: np.ndarray, evaluated: np.ndarray, n: int) -> list[int]:
        """Indices of up to n candidates, each the one that adds most to the hypervolume of what is there by then.

        What was evaluated counts with its real values; the objectives are scaled to the evaluated range.
        """
        low, high = evaluated.min(0), evaluated.max(0)
        span = np.where(high > low, high - low, 1.0)
        candidates, front = (foreseen - low) / span, (evaluated - low) / span
        front = front[non_dominated(front)]
        reference = np.full(foreseen.shape[1], 1.1)
        eligible = np.flatnonzero(non_dominated(candidates) | (self.random.random(len(candidates)) < 0.5))
        picked: list[int] = []
        while len(picked) < n and len(eligible):
            base = hypervolume(front, reference)
            gains = [hypervolume(np.vstack([front, candidates[i]]), reference) - base for i in eligible]
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            picked.append(int(eligible[best]))
            front = np.vstack([front, candidates[eligible[best]]])
            eligible = np.delete(eligible, best)
        rest = [int(i) for i in order(candidates).argsort() if i not in picked] if len(candidates) else []
        return picked + rest[: n - len(picked)]
