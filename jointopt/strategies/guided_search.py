"""Search guided by predictors: a first design by kinds of genes, then what the predictors foresee as the front.

Each round learns the measured objectives from all evaluations and draws a few functions from what is then believed.
Candidates are the best genomes of the mean and of each draw, over many weightings of the objectives, improved by an
inner NSGA-II; a batch is picked one by one for the hypervolume that it is expected to add under the draws. Computed
objectives are never predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from jointopt.objectives import Constraint, Objective, non_dominated
from jointopt.predictors import Choices, Predictor
from jointopt.strategies.batches import crossed
from jointopt.strategies.beliefs import Beliefs
from jointopt.strategies.genetic import distinct, evolve, handicapped
from jointopt.strategies.strategy import Strategy
from quant.errors import JointoptError
from search_spaces.space import SearchSpace

FEWEST = 5
"""Evaluations without which nothing is learned."""
LEARNED = 1000
"""Evaluations that are learned from at a time: what that takes grows with the square of their number, and more."""
GOLDEN = 0.6180339887
UNIFORM = 4
"""Choices of the leading group of genes that the first design tries before all others."""
WEIGHTINGS = 20
CROSSED = 24, 3000
"""Of how many of the best genomes beginnings and ends are put together, to about how many."""


class GuidedSearch(Strategy):
    """Evaluates what the predictors foresee as the front.

    Args:
        initial: number of genomes in the initial design.
        population: of the inner search.
        generations: of the inner search.
        draws: functions drawn from the predictors' posterior.
        prior: measured objective -> for each gene an array [choices], an estimate of how much each choice worsens that
            objective (less is better, whichever its direction) in any unit. It shapes the initial design; how far it
            is believed after that, the evaluations decide.
        parts: of what is evaluated, in the order in which they run, each the places of the genes that it hangs on: one
            that all others follow, then those that take the time. Genomes of a batch that agree on the first parts
            share what these compute, and a batch is picked for what it adds in its time. Without any nothing is shared.

    Raises:
        JointoptError: a prior for what is no measured objective, of other shapes or not finite; what `Strategy` raises.
    """

    beliefs: type[Beliefs] = Beliefs
    """What decides by what was told. Benchmarks put others in its place."""

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        seed: int = 0,
        constraints: Sequence[Constraint] = (),
        initial: int = 10,
        population: int = 100,
        generations: int = 20,
        draws: int = 32,
        prior: Mapping[str, Sequence[np.ndarray]] | None = None,
        parts: Sequence[Sequence[int]] = (),
    ):
        super().__init__(space, objectives, seed, constraints)
        self.initial, self.population, self.generations, self.draws = initial, population, generations, draws
        self.parts = parts
        self.choices = Choices(space, objectives)
        self.take_prior(prior or {})
        self._paths = [
            _path(int(a), int(b), int(k)) for a, b, k in zip(space.smallest, space.largest, space.sizes, strict=True)
        ]

    def take_prior(self, prior: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Puts a prior in the place of what there was, for what is asked from now on."""
        if not isinstance(prior, Mapping):
            raise JointoptError(f"prior: found {prior!r}; allowed: measured objective -> an array for each gene")
        names = {self.objectives[at].name: at for at in self.choices.measured}
        found = {}  # measured objective's column -> features of its prior, see `Choices.prior`
        for name, estimate in prior.items():
            if name not in names:
                raise JointoptError(
                    f"prior: found {name!r}; allowed: measured objectives: {', '.join(names) or 'none'}"
                )
            arrays = [np.asarray(each, dtype=float) for each in estimate]
            for gene, array in zip(self.space.genes, arrays, strict=False):
                if array.shape != (len(gene.choices),) or not np.isfinite(array).all():
                    raise JointoptError(
                        f"prior of {name!r}: gene {gene.name!r} has shape {array.shape}; "
                        f"allowed: ({len(gene.choices)},), finite"
                    )
            if len(arrays) != len(self.space):
                raise JointoptError(
                    f"prior of {name!r}: found {len(arrays)} arrays; allowed: one a gene, {len(self.space)}"
                )
            found[names[name]] = self.choices.prior(np.concatenate(arrays))
        self.priors: dict[int, np.ndarray] = found

    def ask(self, n: int) -> np.ndarray:
        with threadpool_limits(1, "blas"):  # a second one has more to wait than to compute, more so on a busy machine
            return super().ask(n)

    def propose(self, n: int) -> Iterable[np.ndarray]:
        known = np.isfinite(self.values).all(axis=1)
        if len(self._seen) < self.initial or known.sum() < FEWEST:
            yield from self._design(n)
            return
        kept = np.flatnonzero(known)[self._most_telling(self.costs()[known])]
        beliefs = self.believed(self.told[kept], self.costs()[kept])
        found = self._askable(self._candidates(beliefs))
        if self.parts and n > 1 and len(found):
            best = found[beliefs.picked(found, CROSSED[0])]
            more = np.vstack([found, crossed(self.space, self.parts, best, CROSSED[1])])
            found = self._askable(more[distinct(more)])
        picked = beliefs.picked(found, n, self.parts)
        self.predicted[: len(picked)] = beliefs.foreseen(found[picked]) * self.choices.signs
        yield from found[picked]

    def believed(self, told: np.ndarray, costs: np.ndarray) -> Beliefs:
        """What is believed of the objectives after these evaluations."""
        return self.beliefs(self.choices, self.feasible, told, costs, self.priors, self.draws, self.random)

    def _most_telling(self, costs: np.ndarray) -> np.ndarray:
        """Places of up to LEARNED of them: first what nothing dominates, then the latest."""
        excess = self.feasible.measured_excess(costs * self.choices.signs)
        dominated = ~non_dominated(handicapped(costs, excess))
        return np.sort(np.lexsort((-np.arange(len(costs)), dominated))[:LEARNED])

    def _askable(self, genomes: np.ndarray) -> np.ndarray:
        """Those that were not asked, keep to the exact constraints and are likely to succeed."""
        unseen = np.array([genome.tobytes() not in self._seen for genome in genomes], dtype=bool)
        found = genomes[unseen & (self.feasible.excess(genomes) == 0)]
        return found[self._safe(found)]

    def _safe(self, genomes: np.ndarray) -> np.ndarray:
        """Whether they are more likely than not to succeed, by what failed before."""
        failed = ~np.isfinite(self.values[-LEARNED:]).all(axis=1)
        if not failed.any() or not len(genomes):
            return np.ones(len(genomes), dtype=bool)
        return Predictor(self.choices, self.told[-LEARNED:], failed.astype(float), transforms=False)(genomes) < 0.5

    def _design(self, n: int) -> Iterable[np.ndarray]:
        """The two ends; the largest with one group of genes changed together, which shows what a uniform choice costs
        where all else is well; then genomes in between: levels spread evenly, each kind of gene around its own."""
        yield from (self.space.largest, self.space.smallest)
        yield from self._foretold((self.initial - 2) // 2)
        yield from self._grouped()[: 3 * (self.initial - 2) // 4]
        for at in range(len(self._seen), len(self._seen) + 20 * n):
            yield self._strewn((0.5 + at * GOLDEN) % 1)

    def _foretold(self, n: int) -> np.ndarray:
        """Genomes spread along the front as the prior has it; none where there is none."""
        if not self.priors:
            return np.empty((0, len(self.space)), dtype=np.int64)
        tables = self.choices.exact_tables()
        for at, prior in self.priors.items():
            tables[at] = prior[:, 0]
        found = self._best_of_sums(tables[None])
        found = found[distinct(found)]
        return found[np.linspace(0, len(found) - 1, n + 2).round().astype(int)[1:-1]]

    def _grouped(self) -> list[np.ndarray]:
        """The largest genome with all genes whose choices mean the same at one of these. Of the group that most of the
        costs hang on, number formats as a rule, UNIFORM of them: what is uniform is what anyone would try first. Of
        each other group the middle one; then the smallest, then the others."""
        groups: dict[int, list[int]] = {}
        for at, (gene, group) in enumerate(zip(self.space.genes, self.choices.alike.tolist(), strict=True)):
            if len(gene.choices) > 1:
                groups.setdefault(group, []).append(at)
        ordered = sorted(groups.values(), key=lambda members: -self.choices.share[members].sum())
        found = []
        for rank, members in enumerate(ordered):
            path = self._paths[members[0]][:-1]
            middle = path[(len(path)) // 2]
            for turn, choice in enumerate(dict.fromkeys([middle, *path])):
                genome = self.space.largest.copy()
                genome[members] = choice
                found.append((turn if rank else turn // UNIFORM, self.space.canonical(genome)))
        return [genome for _, genome in sorted(found, key=lambda each: each[0])]

    def _strewn(self, level: float) -> np.ndarray:
        kinds = self.choices.kinds
        kind_level = np.clip(level + self.random.normal(0, 0.25, kinds.max() + 1), 0.02, 0.98)
        place = np.clip(kind_level[kinds] + self.random.normal(0, 0.4, len(self.space)), 0, 1 - 1e-9)
        genome = [path[int(at * len(path))] for path, at in zip(self._paths, place, strict=True)]
        return self.space.canonical(np.array(genome))

    def _candidates(self, beliefs: Beliefs) -> np.ndarray:
        """Distinct genomes: the best of the mean and of each draw, what was told, and what an inner search finds."""
        tables = [beliefs.mean_tables()] * 3 + list(beliefs.drawn_tables())
        pool = np.vstack([beliefs.told, self._best_of_sums(np.stack(tables))])
        pool = pool[distinct(pool)]
        front = non_dominated(beliefs.constrained(pool))
        others = self.random.permutation(np.flatnonzero(~front))
        start = pool[np.concatenate([np.flatnonzero(front), others])[: self.population]]
        evolved, _ = evolve(self.space, start, beliefs.constrained, self.generations, self.random)
        pool = self.feasible.repaired(np.vstack([pool, evolved]), self.random)
        return pool[distinct(pool)]

    def _best_of_sums(self, tables: np.ndarray) -> np.ndarray:
        """For each of `tables` [k, objectives, slots] and WEIGHTINGS weightings of the objectives, the genome with the
        least weighted sum of its choices' effects.

        A gene on which others hang counts what the best of those would add where its choice lets them matter; one
        that hangs on several counts for the last.
        """
        starts = self.choices.offsets
        spans = np.maximum.reduceat(tables, starts, axis=2) - np.minimum.reduceat(tables, starts, axis=2)
        scale = np.maximum(spans.sum(2), 1e-12)[:, None]
        worth = (self._weightings(len(tables)) / scale) @ tables
        worth = worth.reshape(-1, worth.shape[2])
        space, offsets = self.space, self.choices.offsets
        names = {name: at for at, name in enumerate(space.names)}
        genomes = np.zeros((len(worth), len(space)), dtype=np.int64)
        for at in range(len(space) - 1, -1, -1):
            slots = worth[:, offsets[at] : offsets[at] + space.sizes[at]]
            genomes[:, at] = slots.argmin(1)
            requires = space.genes[at].requires
            if requires:
                last = max(names[name] for name in requires)
                allowed = requires[space.names[last]]
                lets = np.array([choice in allowed for choice in space.genes[last].choices])
                worth[:, offsets[last] : offsets[last] + space.sizes[last]] += slots.min(1)[:, None] * lets
        return space.canonical(genomes)

    def _weightings(self, k: int) -> np.ndarray:
        """Weights of the objectives, adding up to 1: [k, WEIGHTINGS, objectives]."""
        count = len(self.objectives)
        if count == 2:
            ratio = np.linspace(-5, 5, WEIGHTINGS) + self.random.uniform(-0.3, 0.3, (k, 1))
            logits = np.stack([ratio, -ratio], axis=2) / 2
        else:
            logits = self.random.normal(0, 2, (k, WEIGHTINGS, count))
        weights = np.exp(logits)
        return weights / weights.sum(2, keepdims=True)


def _path(first: int, last: int, size: int) -> list[int]:
    """A gene's choices from its small end to its large one."""
    between = [at for at in range(size) if at not in (first, last)]
    return [first, *between, last] if first != last else [first, *between]
