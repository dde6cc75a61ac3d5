"""The genetic operators, on integer genomes, with the selection of NSGA-II (Deb et al., 2002).

`select` is DEAP's; `order` is the same ranking of arrays, ties aside, for the inner searches, which rank thousands of
times.
"""

from __future__ import annotations

from collections.abc import Callable

import moocore
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
    """Each row's place, 0 the best: by front, then by crowding distance. Of equal distances, such as the infinite ones
    of a front's ends, the first row is first; `select` has DEAP's order of them, and so may keep another end."""
    rank = moocore.pareto_rank(costs)
    distance = np.empty(len(costs))
    for each in range(rank.max(initial=-1) + 1):
        distance[rank == each] = _crowding(costs[rank == each])
    place = np.empty(len(costs), dtype=np.int64)
    place[np.lexsort((-distance, rank))] = np.arange(len(costs))
    return place


def handicapped(costs: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Costs with which every row that exceeds a constraint is worse than all that exceed none, and the more the worse
    (Deb et al. 2002, section VI)."""
    worst = np.max(costs, axis=0, initial=-np.inf, where=np.isfinite(costs))
    return np.where(excess[:, None] > 0, worst + excess[:, None], costs)


def _crowding(front: np.ndarray) -> np.ndarray:
    """Crowding distance of each row (Deb et al. 2002, section III-B)."""
    distance = np.zeros(len(front))
    for column in front.T:
        sorting = np.argsort(column, kind="stable")
        ordered = column[sorting]
        distance[sorting[[0, -1]]] = np.inf
        span = ordered[-1] - ordered[0]
        if span > 0:
            distance[sorting[1:-1]] += (ordered[2:] - ordered[:-2]) / span
    return distance


def distinct(genomes: np.ndarray) -> np.ndarray:
    """Indices of the first of each set of equal rows, in order."""
    found: dict[bytes, int] = {}
    for at, genome in enumerate(genomes):
        found.setdefault(genome.tobytes(), at)
    return np.fromiter(found.values(), dtype=np.int64, count=len(found))


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
    """NSGA-II on a function that costs nothing to call; returns the last population, the best first, and its costs."""
    size = len(population)
    costs = cost_of(population)
    place = order(costs)
    for _ in range(generations):
        children = offspring(space, population, place, size, random)
        merged = np.vstack([population, children])
        merged_costs = np.vstack([costs, cost_of(children)])
        unique = distinct(merged)
        kept = unique[np.argsort(order(merged_costs[unique]))[:size]]
        population, costs, place = merged[kept], merged_costs[kept], np.arange(len(kept))
    return population, costs
