"""The genetic operators, on integer genomes; ranking and selection are DEAP's NSGA-II (Deb et al., 2002)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from deap import base, tools

from search_spaces.space import SearchSpace


class _Ranked:
    """What DEAP's selection wants to see: something with a fitness. `index` is its row."""

    def __init__(self, index: int, fitness: base.Fitness):
        self.index, self.fitness = index, fitness


def _ranked(costs: np.ndarray) -> list[_Ranked]:
    if costs.shape[1] == 1:  # DEAP sorts by two objectives at least.
        costs = np.repeat(costs, 2, axis=1)
    kind = type("Fitness", (base.Fitness,), {"weights": (-1.0,) * costs.shape[1]})
    return [_Ranked(index, kind(row)) for index, row in enumerate(costs.tolist())]


def select(costs: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k best rows of `costs` (less is better): by front, within the last front by crowding."""
    if len(costs) <= k:
        return np.arange(len(costs))
    return np.array([each.index for each in tools.selNSGA2(_ranked(costs), k, nd="log")])


def order(costs: np.ndarray) -> np.ndarray:
    """Each row's place, 0 the best: by front, then by crowding distance."""
    place = np.empty(len(costs), dtype=np.int64)
    at = 0
    for front in tools.sortLogNondominated(_ranked(costs), len(costs)):
        tools.emo.assignCrowdingDist(front)
        for each in sorted(front, key=lambda one: -one.fitness.crowding_dist):
            place[each.index] = at
            at += 1
    return place


def offspring(
    space: SearchSpace, parents: np.ndarray, place: np.ndarray, n: int, random: np.random.Generator
) -> np.ndarray:
    """n children, canonical: parents by binary tournament, uniform crossover, then on average one mutated gene.

    Args:
        place: of each parent, see `order`.
    """
    contenders = random.integers(0, len(parents), size=(2, n, 2))
    winners = np.where(place[contenders[..., 0]] <= place[contenders[..., 1]], contenders[..., 0], contenders[..., 1])
    first, second = parents[winners[0]], parents[winners[1]]
    children = np.where(random.random((n, len(space))) < 0.5, first, second)
    rate = 1.0 / np.maximum(1, space.active(children).sum(axis=1, keepdims=True))
    mutated = random.random(children.shape) < rate
    drawn = random.integers(0, space.sizes, size=children.shape)
    return space.canonical(np.where(mutated, drawn, children))


def evolve(
    space: SearchSpace,
    population: np.ndarray,
    cost_of: Callable[[np.ndarray], np.ndarray],
    generations: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """NSGA-II on a function that costs nothing to call; returns the last population and its costs."""
    size = len(population)
    costs = cost_of(population)
    for _ in range(generations):
        children = offspring(space, population, order(costs), size, random)
        merged = np.vstack([population, children])
        _, distinct = np.unique(merged, axis=0, return_index=True)
        merged = merged[np.sort(distinct)]
        merged_costs = np.vstack([costs, cost_of(children)])[np.sort(distinct)]
        kept = select(merged_costs, size)
        population, costs = merged[kept], merged_costs[kept]
    return population, costs
