"""Genomes that keep to what can be computed exactly: whether there are any, and the way to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product

import numpy as np

from jointopt.objectives import COSTS, Constraint, Objective, cost_and_unit
from jointopt.strategies.genetic import distinct, offspring
from quant.errors import JointoptError
from search_spaces.space import SearchSpace

BEYOND_ALL = 1e6
"""Spans that a genome is beyond a constraint where its value is no finite number: what cannot run."""
STARTS = 6
"""Random genomes, beside the two ends, from which one that keeps to all constraints is sought."""
ENUMERATED = 2 * 10**5
"""Combinations of choices that are all gone through before it is said that none keeps to the constraints."""
EVOLVED, GENERATIONS = 100, 100
"""Genomes, and their generations, in which one is sought where there are more."""


def _values(each: Constraint, compute: Callable[[np.ndarray], np.ndarray], genomes: np.ndarray) -> np.ndarray:
    """What a constraint's function computes of genomes, [n]. Raises JointoptError for anything else."""
    try:
        values = np.asarray(compute(genomes.copy()), dtype=float)  # which it may write to
    except (TypeError, ValueError) as error:
        raise JointoptError(f"constraint {each.name!r}: its function gave no numbers: {error}") from None
    if values.shape != (len(genomes),):
        raise JointoptError(
            f"constraint {each.name!r}: its function gave {list(values.shape)} for {len(genomes)} genomes; allowed: "
            "one number each"
        )
    return values


class Feasible:
    """The genomes of a space that keep to the exact ones of some constraints.

    Attributes:
        measured: the other constraints, as (column of the objective, constraint).
        anchor: a genome that keeps to all exact ones.

    Raises:
        JointoptError: a constraint on what is neither an objective nor computed; exact ones that no genome
            meets, or that none was found to meet.
    """

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], constraints: Sequence[Constraint]):
        self.space = space
        self.measured: list[tuple[int, Constraint]] = []
        self._exact: list[tuple[Constraint, Callable[[np.ndarray], np.ndarray], float]] = []
        names = [objective.name for objective in objectives]
        drawn = np.vstack([space.smallest, space.largest, space.sample(100, 0)])
        for each in constraints:
            column = names.index(each.name) if each.name in names else None
            compute = each.compute if each.compute or column is None else objectives[column].compute
            if compute is not None:
                finite = [value for value in _values(each, compute, drawn) if np.isfinite(value)]
                self._exact.append((each, compute, float(np.ptp(finite)) if len(set(finite)) > 1 else 1.0))
            elif column is not None:
                self.measured.append((column, each))
            else:
                raise JointoptError(f"constraint {each.name!r}: is no objective; allowed: {', '.join(names)}")
        self.anchor = self._anchored()

    def excess(self, genomes: np.ndarray) -> np.ndarray:
        """How far genomes are beyond the exact constraints, 0 where they keep to all; in spans of the space, [n]."""
        found = np.zeros(len(genomes))
        for each, compute, span in self._exact:
            values = _values(each, compute, genomes)
            found += np.where(np.isfinite(values), each.excess(values) / span, BEYOND_ALL)
        return found

    def measured_excess(self, values: np.ndarray) -> np.ndarray:
        """The same of values [..., objectives] under the other constraints, in shares of their limits: [...]."""
        found = np.zeros(values.shape[:-1])
        for column, each in self.measured:
            found += each.excess(values[..., column]) / (abs(each.limit) or 1.0)
        return found

    def repaired(self, genomes: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Genomes that violate an exact constraint get the anchor's choice in some genes: the first of a random order,
        as few as are needed."""
        wrong = np.flatnonzero(self.excess(genomes) > 0)
        rank = random.permuted(np.tile(np.arange(len(self.space)), (len(wrong), 1)), axis=1)
        low, high = np.zeros(len(wrong), dtype=int), np.full(len(wrong), len(self.space))
        while (high - low > 1).any():
            middle = (low + high) // 2
            fits = self.excess(self._towards_anchor(genomes[wrong], rank < middle[:, None])) == 0
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        repaired = genomes.copy()
        repaired[wrong] = self._towards_anchor(genomes[wrong], rank < high[:, None])
        return repaired

    def _towards_anchor(self, genomes: np.ndarray, genes: np.ndarray) -> np.ndarray:
        return self.space.canonical(np.where(genes, self.anchor, genomes))

    def _anchored(self) -> np.ndarray:
        every = math.prod(map(int, self.space.sizes)) <= ENUMERATED
        # What a sub-network costs grows with each gene, so that its least and its most are where descent ends.
        sure = every or (len(self._exact) == 1 and cost_and_unit(self._exact[0][0].name)[0] in COSTS)
        found = []
        for candidate in self._candidates(every, sure):
            if not self.excess(candidate[None])[0]:
                return candidate
            found.append(candidate)
        raise self._unmet(found[int(np.argmin(self.excess(np.array(found))))], sure)

    def _candidates(self, every: bool, sure: bool) -> Iterator[np.ndarray]:
        """Genomes of which one may keep to all constraints, by ways that take ever longer. Raises JointoptError where
        no genome meets one of several constraints even by itself."""
        starts = np.vstack([self.space.largest, self.space.smallest, self.space.sample(STARTS, 0)])
        starts = starts[np.argsort(self.excess(starts), kind="stable")]
        ends = []
        for start in starts:
            ends.append(self._descended(start))
            yield ends[-1]
        for each, compute, _ in self._exact if len(self._exact) > 1 else ():
            Feasible(self.space, (), (Constraint(each.name, each.limit, each.relation, compute),))
        if every or not sure:
            for genomes in self._all() if every else self._evolved(np.vstack([ends, starts])):
                yield genomes[self.excess(genomes).argmin()]

    def _unmet(self, closest: np.ndarray, sure: bool) -> JointoptError:
        """What there is to say where none was found."""
        told, ending = ("no genome meets", "") if sure else ("found no genome that meets", ", and there may be one")
        limits = ", ".join(str(each) for each, *_ in self._exact)
        reached = [(each.name, f"{compute(closest[None])[0]:g}") for each, compute, _ in self._exact]
        if len(reached) == 1:
            return JointoptError(f"constraint {limits}: {told} it; the best has {reached[0][1]}{ending}")
        values = ", ".join(map(" ".join, reached))
        return JointoptError(f"constraints {limits}: {told} them together; the closest has {values}{ending}")

    def _all(self) -> Iterator[np.ndarray]:
        """Every genome, some thousands at a time."""
        combinations = product(*(range(size) for size in self.space.sizes))
        while some := list(islice(combinations, 10_000)):
            yield self.space.canonical(np.array(some, dtype=np.int64))

    def _evolved(self, genomes: np.ndarray) -> Iterator[np.ndarray]:
        """What comes of these by changing several genes at once, and at the end of the best of it by one more each."""
        population = np.vstack([genomes, self.space.sample(EVOLVED, 0)])
        random = np.random.default_rng(0)
        for _ in range(GENERATIONS):
            children = offspring(self.space, population, np.arange(len(population)), EVOLVED, random)
            merged = np.vstack([population, children])
            merged = merged[distinct(merged)]
            population = merged[np.argsort(self.excess(merged), kind="stable")[:EVOLVED]]
            yield population[:1]
        yield np.array([self._descended(each) for each in population[:STARTS]])

    def _descended(self, genome: np.ndarray) -> np.ndarray:
        return descended(self.space, self.excess, genome)


def descended(space: SearchSpace, excess: Callable[[np.ndarray], np.ndarray], genome: np.ndarray) -> np.ndarray:
    """Each gene in turn at its best choice, until nothing is in excess, or none is improved by one gene alone.

    Args:
        excess: genomes [n, genes] -> what is to become 0, or as little as can be [n].
    """
    genome, least = genome.copy(), float(excess(genome[None])[0])
    improved = least > 0
    while improved:
        improved = False
        for at, size in enumerate(space.sizes):
            tried = np.repeat(genome[None], size, axis=0)
            tried[:, at] = np.arange(size)
            tried = space.canonical(tried)
            values = excess(tried)
            if values.min() < least:
                genome, least, improved = tried[values.argmin()], float(values.min()), True
    return genome
