"""Search problems of architectures alone: ordered widths, Once-for-All's ResNet, cells of several types.

Beside problems.py's, whose genes are number formats for the most part. Here the choices of a gene are ordered, what is
lost by one bends sharply somewhere along them, sizes are products of neighbours, and a cell's first gene decides which
others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from jointopt.objectives import Objective
from search_spaces.space import Gene, SearchSpace

Law = tuple[SearchSpace, tuple[Objective, ...], Callable[[np.ndarray], np.ndarray]]
"""A space, its objectives, and what they are of genomes, without noise [n, objectives]."""
CHANNELS, STRIDES = np.array([24, 40, 80, 112, 160]), np.array([4, 8, 16, 16, 32])
"""Of the ResNet's stages."""
CELL = {
    "attention": {"heads": (2, 4, 8), "format": ("fp16", "int8", "int4")},
    "conv": {"kernel": (3, 5, 7), "expand": (1, 2, 4), "format": ("fp16", "int8", "int4")},
    "mlp": {"ratio": (1, 2, 3, 4), "format": ("fp16", "int8", "int4")},
}
"""Each type of cell, with genes of its own."""
TYPES = (*CELL, "skip")
LARGEST = {"attention": 2.0, "conv": 1.0, "mlp": 3.0}
"""MACs of a cell of each type in fp16, of its largest."""


def _accuracy(loss: np.ndarray) -> np.ndarray:
    return 0.1 + 0.88 / (1 + np.exp(2.5 * (loss - 1.2)))


def _law(space: SearchSpace, quality: str, of: Callable, cost: str, spent: Callable) -> Law:
    wanted = (Objective(quality, "max"), Objective(cost, "min", spent))
    return space, wanted, lambda genomes: np.stack([of(genomes), spent(genomes)], axis=1)


def widths(count: int = 30, seed: int = 0) -> Law:
    """Layers of eight widths. Each loses little down to a width of its own, and much below; its size is its width times
    that of the layer before."""
    random = np.random.default_rng(seed)
    genes = [Gene(f"layer{at}.width", tuple(range(32, 257, 32))) for at in range(count)]
    space = SearchSpace(genes, smallest=np.zeros(count, int), largest=np.full(count, 7))
    share = np.arange(1, 9) / 8
    knee, scale = random.uniform(0.2, 0.8, (count, 1)), random.lognormal(0, 1, (count, 1))
    losses = scale * ((np.maximum(0, knee - share) / knee) ** 1.5 + 0.05 * (1 - share))
    weights = random.lognormal(0, 0.5, count + 1)

    def loss(genomes: np.ndarray) -> np.ndarray:
        return losses[np.arange(count), genomes].sum(1)

    def size(genomes: np.ndarray) -> np.ndarray:
        ends = np.ones((len(genomes), 1))
        wide = np.hstack([0.3 * ends, share[genomes], 0.5 * ends])
        return (wide[:, :-1] * wide[:, 1:] * weights).sum(1)

    middle = np.median(loss(space.sample(1000, 1)))
    return _law(space, "accuracy", lambda genomes: _accuracy(1.5 * loss(genomes) / middle), "size", size)


def once_for_all(seed: int = 0) -> Law:
    """Resolution, width, and of five stages the depth and each layer's kernel and expansion (Cai et al. 2020)."""
    random = np.random.default_rng(seed)
    genes = [Gene("resolution", (128, 160, 192, 224)), Gene("width", (0.65, 0.8, 1.0))]
    for stage in range(5):
        genes.append(Gene(f"stage{stage}.depth", (2, 3, 4)))
        for layer in range(4):
            needs = {f"stage{stage}.depth": tuple(range(layer + 1, 5))} if layer > 1 else {}
            name = f"stage{stage}.layer{layer}"
            genes += [Gene(f"{name}.kernel", (3, 5, 7), needs), Gene(f"{name}.expand", (3, 4, 6), needs)]
    space = SearchSpace(genes, smallest=[0] * len(genes), largest=[len(gene.choices) - 1 for gene in genes])
    importance, weight = random.lognormal(0, 0.5, 5), random.lognormal(0, 0.3, (5, 4))
    wider = random.uniform(0.02, 0.15, (5, 4))

    def numbers(genomes: np.ndarray, name: str) -> np.ndarray:
        at = space.names.index(name)
        return np.array(space.genes[at].choices)[genomes[:, at]]

    def layers(genomes: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
        active = space.active(genomes)
        for stage, layer in np.ndindex(5, 4):
            name = f"stage{stage}.layer{layer}"
            there = active[:, space.names.index(f"{name}.kernel")]
            yield stage, layer, there, numbers(genomes, f"{name}.kernel"), numbers(genomes, f"{name}.expand")

    def top1(genomes: np.ndarray) -> np.ndarray:
        side, width = numbers(genomes, "resolution") / 224, numbers(genomes, "width")
        capacity = np.zeros((len(genomes), 5))
        for stage, layer, there, kernel, expand in layers(genomes):
            gained = np.log(expand * width) + wider[stage, layer] * (kernel - 3) * side
            capacity[:, stage] += there * weight[stage, layer] * gained
        lost = (importance * np.exp(-0.35 * capacity)).sum(1) + 0.8 * (1 / side - 1) + 0.4 * (1 / width - 1)
        return 0.82 - 0.06 * lost

    def macs(genomes: np.ndarray) -> np.ndarray:
        side, width = numbers(genomes, "resolution"), numbers(genomes, "width")
        total = 10.0 * side**2 * width
        for stage, _, there, kernel, expand in layers(genomes):
            channels = CHANNELS[stage] * width
            total += there * (side / STRIDES[stage]) ** 2 * channels * expand * (2 * channels + kernel**2)
        return total / 1e6

    return _law(space, "top1", top1, "macs", macs)


def typed_cells(count: int = 12, seed: int = 0) -> Law:
    """Cells whose first gene says what they are: attention, which early cells miss most, a convolution, which late ones
    do, an MLP, or nothing. A cell's MACs are the product of its own choices."""
    random = np.random.default_rng(seed)
    genes, losses = [], []
    for cell in range(count):
        scale, place = random.lognormal(0, 0.6), cell / (count - 1)
        genes.append(Gene(f"cell{cell}.type", TYPES))
        missed = np.array([0.6 * (1 - place), 0.6 * place, 0, 0])
        losses.append(scale * (missed + random.lognormal([-2, -2, -0.7, 0.4], 0.5)))
        for kind, own in CELL.items():
            for name, choices in own.items():
                genes.append(Gene(f"cell{cell}.{kind}.{name}", choices, {f"cell{cell}.type": (kind,)}))
                smaller = (1 - np.arange(len(choices)) / (len(choices) - 1)) ** random.uniform(1, 2.5)
                lost = np.array([0, 0.1, 1.5]) if name == "format" else smaller
                losses.append(scale * random.lognormal(-1.5, 0.7) * lost)
    table = np.array([np.pad(each, (0, 4 - len(each))) for each in losses])
    special = {"type": (TYPES.index("skip"), TYPES.index("mlp")), "format": (2, 0)}  # smallest, largest
    ends = [special.get(gene.name.split(".")[-1], (0, len(gene.choices) - 1)) for gene in genes]
    smallest, largest = np.array(ends).T
    space = SearchSpace(genes, smallest=smallest, largest=largest)

    def loss(genomes: np.ndarray) -> np.ndarray:
        return (table[np.arange(len(space)), genomes] * space.active(genomes)).sum(1)

    def macs(genomes: np.ndarray) -> np.ndarray:
        active, total = space.active(genomes), np.ones(len(genomes))
        for cell, (kind, own) in product(range(count), CELL.items()):
            spent = LARGEST[kind] * active[:, space.names.index(f"cell{cell}.{kind}.format")]
            for name, choices in own.items():
                chosen = genomes[:, space.names.index(f"cell{cell}.{kind}.{name}")]
                parts = np.array([1, 0.5, 0.25] if name == "format" else choices)
                spent = spent * (parts / parts.max())[chosen]
            total += spent
        return total

    middle = np.median(loss(space.sample(1000, 1)))
    return _law(space, "accuracy", lambda genomes: _accuracy(1.2 * loss(genomes) / middle), "macs", macs)
