"""A problem that needs no model: a space in which genes hang on others, and objectives that are sums."""

from __future__ import annotations

import numpy as np

from jointopt import Gene, Objective, SearchSpace, strategies

STRATEGIES = list(strategies.STRATEGIES)
WEIGHTS = np.array([0.2, 3.0, 1.0, 0.5, 0.1, 2.0, 0.4, 1.5, 0.7, 0.3, 1.1, 0.9])


def conditional_space() -> SearchSpace:
    genes = []
    for block in range(4):
        needs = {f"block{block}.keep": (True,)}
        genes += [
            Gene(f"block{block}.keep", (False, True)),
            Gene(f"block{block}.width", (1, 2, 4), needs),
            Gene(f"block{block}.format", ("W4A16", "W8A8", "none"), needs),
        ]
    return SearchSpace(genes)


SPACE = conditional_space()


def size(genomes: np.ndarray) -> np.ndarray:
    return ((genomes + 1.0) * SPACE.active(genomes)).sum(1)


def loss(genomes: np.ndarray) -> np.ndarray:
    return (np.array([1, 2, 2] * 4) - genomes) ** 1.5 @ WEIGHTS


def macs(genomes: np.ndarray) -> np.ndarray:
    return (genomes[:, 0::3] * (1 + genomes[:, 1::3])).sum(1).astype(float)


TWO = (Objective("loss", "min"), Objective("size", "min", compute=size))
MEASURES = {"loss": loss, "size": size, "macs": macs, "accuracy": lambda genomes: 1 / (1 + loss(genomes))}


def measure(genomes: np.ndarray, objectives=TWO) -> np.ndarray:
    return np.stack([MEASURES[objective.name](genomes) for objective in objectives], axis=1)


def searched(name: str, rounds: int, objectives=TWO, batch: int = 10, **options):
    strategy = strategies.create(name, SPACE, objectives, seed=3, **options)
    for _ in range(rounds):
        genomes = strategy.ask(batch)
        strategy.tell(genomes, measure(genomes, objectives))
    return strategy
