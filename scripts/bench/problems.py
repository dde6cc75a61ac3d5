"""Search problems that need no model: real super-networks as recorded, and synthetic ones that look like them.

A recorded problem is a regression on thousands of real evaluations (scripts/bench/record.py made the tables), one
number for each choice and for each pair of choices in a block, with the residuals of evaluations that were held out as
its noise. Size and MACs are such regressions too, and exact as far as the searches go.

A synthetic problem's quality is a sum over the layers that are there, plus pairwise interactions, seen through a
transform (accuracy saturates, perplexity explodes) and measured with noise; sizes and MACs are exact (architectures.py
has those without number formats). Everything is drawn from the problem's seed. Hypervolume is taken on noise-free
values, between the stated corners.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from architectures import Law, once_for_all, typed_cells, widths
from scipy.sparse import csr_array

from jointopt.objectives import Objective, hypervolume, minimized
from search_spaces.space import Gene, SearchSpace

TABLES = Path(__file__).parent / "tables"
HELD_OUT = 0.2
"""Share of a table by which the regression is judged and from which its noise is."""
PENALTY = 30.0
"""Of the ridge regression of what was measured."""
BITS = {"none": 16.0, "W8A8": 8.0, "FP8": 8.0, "W4A16": 4.25, "NVFP4": 4.5}
WIDTHS = (0.25, 0.5, 0.75, 1.0)
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "loss": lambda loss: loss,
    "accuracy": lambda loss: 0.1 + 0.88 / (1 + np.exp(2.5 * (loss - 1.2))),
    "perplexity": lambda loss: 8 * np.exp(1.5 * loss),
    "steep": lambda loss: 8 * np.exp(6 * loss),
}


@dataclass(frozen=True)
class Problem:
    """A space, its objectives, and what a genome is worth.

    Attributes:
        exact: genomes -> noise-free values [n, objectives].
        noise: adds measurement noise to such values, given a random generator.
        ideal, reference: the corners, less is better, between which hypervolume is a share.
    """

    name: str
    space: SearchSpace
    objectives: tuple[Objective, ...]
    exact: Callable[[np.ndarray], np.ndarray]
    noise: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    ideal: np.ndarray
    reference: np.ndarray

    @cached_property
    def parts(self) -> list[list[int]]:
        """Places of the genes of what runs before all blocks, then of each block, by their names: what genomes that
        agree on the first of them would share (`GuidedSearch`); none where genes are of no block."""
        blocks = [_block_of(name) for name in self.space.names]
        named = list(dict.fromkeys(block for block in blocks if block is not None and block.startswith("block")))
        before = [at for at, name in enumerate(self.space.names) if name.startswith("embedding")]
        return [before, *([at for at, of in enumerate(blocks) if of == block] for block in named)] if named else []

    def volume(self, values: np.ndarray) -> float:
        """Share of the box between the corners that these values [n, objectives] dominate."""
        costs = (minimized(values, self.objectives) - self.ideal) / (self.reference - self.ideal)
        return hypervolume(np.maximum(costs, 0), np.ones(costs.shape[1]))


def transformer(
    name: str,
    blocks: int,
    layers: int,
    *,
    depth: str = "keep",
    architecture: float = 1.0,
    interactions: float = 0.0,
    transform: str = "loss",
    noise: float = 0.0,
    objectives: tuple[str, ...] = ("quality", "size"),
    seed: int = 0,
) -> Problem:
    """Blocks with a gene each that keeps them (or one depth gene for all); widths of pairs of layers; a format a layer.

    Args:
        architecture: how many times as much is lost by what is dropped or narrowed. Beyond 1, as of models that were
            never trained in smaller sizes, hypervolume ends at the largest one's size and twice its quality (which has
            to be small).
        interactions: standard deviation of the pairwise part, relative to that of the additive part.
        noise: standard deviation of the measurement, relative to the spread along the diagonal.
    """
    random = np.random.default_rng(seed)
    space = _transformer_space(blocks, layers, depth)
    weights = random.lognormal(0, 0.5, layers)
    losses = _transformer_losses(space, blocks, random)
    losses[[not gene.name.endswith("format") for gene in space.genes]] *= architecture
    diagonal = _diagonal(space, 2000, np.random.default_rng(seed + 2))
    drawn = space.sample(2000, seed + 1)
    columns = np.arange(len(space))

    def additive(genomes: np.ndarray) -> np.ndarray:
        return (losses[columns, genomes] * space.active(genomes)).sum(1)

    scale, spread = np.quantile(additive(diagonal), 0.9), additive(drawn).std()
    paired = _pairwise(space, losses, drawn, random)

    def quality(genomes: np.ndarray) -> np.ndarray:
        total = additive(genomes)
        if interactions:  # They vanish with the loss: the full network has none.
            total = total + interactions * spread * paired(genomes) * np.tanh(2 * total / scale)
        return TRANSFORMS[transform](total / scale)

    computed = {
        "size": lambda genomes: _spent(space, genomes, blocks, weights, np.array(list(BITS.values()))),
        "macs": lambda genomes: _spent(space, genomes, blocks, weights, np.ones(len(BITS))),
    }
    direction = "max" if transform == "accuracy" else "min"
    wanted = tuple(Objective(o, "min", computed[o]) if o in computed else Objective(o, direction) for o in objectives)

    def exact(genomes: np.ndarray) -> np.ndarray:
        return np.stack([(o.compute or quality)(genomes) for o in wanted], axis=1)

    framed = _framed(name, space, wanted, exact, diagonal, noise)
    if architecture == 1.0:
        return framed
    costs = minimized(exact(space.largest[None]), wanted)[0]
    measured = np.array([objective.compute is None for objective in wanted])
    ideal, reference = np.where(measured, costs, 0.0), np.where(measured, 2 * costs, costs)
    return replace(framed, ideal=ideal, reference=reference)


def _transformer_space(blocks: int, layers: int, depth: str) -> SearchSpace:
    genes = [Gene("depth", tuple(range(blocks // 2, blocks + 1)))] if depth == "count" else []
    for block in range(blocks):
        needs: dict = {}
        if depth == "keep":
            genes.append(Gene(f"block{block}.keep", (False, True)))
            needs = {f"block{block}.keep": (True,)}
        elif block >= blocks // 2:
            needs = {"depth": tuple(range(block + 1, blocks + 1))}
        genes += [Gene(f"block{block}.width{layer}", WIDTHS, needs) for layer in range(0, layers, 2)]
        genes += [Gene(f"block{block}.layer{layer}.format", tuple(BITS), needs) for layer in range(layers)]
    formats = [gene.name.endswith("format") for gene in genes]
    ends = [("W4A16", 0), ("none", -1)]
    first, last = (
        [
            gene.choices.index(scheme if is_format else gene.choices[end])
            for gene, is_format in zip(genes, formats, strict=True)
        ]
        for scheme, end in ends
    )
    return SearchSpace(genes, smallest=first, largest=last)


def _transformer_losses(space: SearchSpace, blocks: int, random: np.random.Generator) -> np.ndarray:
    """What each choice of each gene costs in quality, [genes, most choices]: blocks differ, and layers in them."""
    sensitivity = random.lognormal(0, 0.8, blocks)
    losses = np.zeros((len(space), int(space.sizes.max())))
    for at, gene in enumerate(space.genes):
        if gene.name == "depth":
            removed = np.cumsum(random.lognormal(0.5, 0.5, len(gene.choices)))[::-1]
            losses[at, : len(gene.choices)] = removed - removed[-1]
            continue
        scale = sensitivity[int(gene.name.split(".")[0].removeprefix("block"))]
        if gene.name.endswith("keep"):
            losses[at, 0] = scale * random.lognormal(1.0, 0.9)
        elif gene.name.endswith("format"):
            by_format = np.array([0, 0.05, 0.08, 0.8, 0.5]) * random.lognormal(0, 0.3, 5)
            losses[at, :5] = scale * random.lognormal(-1.2, 0.9) * by_format
        else:
            narrower = (1 - np.array(WIDTHS)) ** random.uniform(1, 2.5)
            losses[at, :4] = scale * random.lognormal(-0.5, 0.8) * narrower
    return losses


def _pairwise(
    space: SearchSpace, losses: np.ndarray, drawn: np.ndarray, random: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """Genomes -> a sum over six random pairs a gene, as large as their losses; mean 0, deviation 1 on `drawn`."""
    pairs = random.integers(0, len(space), size=(6 * len(space), 2))
    choices = losses.shape[1]
    tables = random.normal(size=(len(pairs), choices, choices)) * np.sqrt(losses.max(1)[pairs].prod(1))[:, None, None]

    def raw(genomes: np.ndarray) -> np.ndarray:
        active, (first, second) = space.active(genomes), pairs.T
        terms = tables[np.arange(len(pairs)), genomes[:, first], genomes[:, second]]
        return (terms * active[:, first] * active[:, second]).sum(1)

    center, spread = raw(drawn).mean(), raw(drawn).std()
    return lambda genomes: (raw(genomes) - center) / spread


def _spent(space: SearchSpace, genomes: np.ndarray, blocks: int, weights: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """What the layers that are there cost: width times weights times the bits of their format."""
    active, spent = space.active(genomes), np.full(len(genomes), 0.2 * blocks)
    places = {name: at for at, name in enumerate(space.names)}
    for name, at in places.items():
        if name.endswith("format"):
            block, layer = name.split(".")[0], int(name.split(".layer")[1].split(".")[0])
            width = np.array(WIDTHS)[genomes[:, places[f"{block}.width{layer - layer % 2}"]]]
            spent += width * bits[genomes[:, at]] * weights[layer] * active[:, at]
    return spent


def scrambled(name: str, count: int, *, seed: int = 0, noise: float = 0.02, objectives: int = 2) -> Problem:
    """Genes whose names, choices and order tell nothing: costs and losses drawn by choice, a few genes conditional.

    With three objectives the third is a second measured quality, related to the first.
    """
    random = np.random.default_rng(seed)
    genes: list[Gene] = []
    for at in range(count):
        choices = tuple("abcde"[: random.integers(2, 6)])
        needs = {}
        if at > 5 and random.random() < 0.2:
            other = genes[int(random.integers(0, at))]
            needs = {other.name: other.choices[: max(1, len(other.choices) - 1)]}
        genes.append(Gene(f"g{at}", choices, needs))
    shape = (count, 5)
    cost = random.lognormal(0, 0.7, (count, 1)) * random.random(shape)
    loss = [-cost * random.lognormal(0, 0.7, (count, 1)) + 0.15 * random.normal(size=shape) for _ in range(2)]
    loss[1] = 0.6 * loss[0] + 0.4 * loss[1]
    sizes = np.array([len(g.choices) for g in genes])
    ordered = np.where(np.arange(5) < sizes[:, None], cost, np.nan)
    space = SearchSpace(genes, smallest=np.nanargmin(ordered, 1), largest=np.nanargmax(ordered, 1))
    columns = np.arange(count)

    def total(table: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda genomes: (table[columns, genomes] * space.active(genomes)).sum(1)

    wanted = [Objective("loss", "min"), Objective("cost", "min", total(cost)), Objective("other", "min")][:objectives]
    tables = {"loss": loss[0], "cost": cost, "other": loss[1]}

    def exact(genomes: np.ndarray) -> np.ndarray:
        return np.stack([total(tables[o.name])(genomes) for o in wanted], axis=1)

    return _framed(name, space, tuple(wanted), exact, _diagonal(space, 2000, random), noise)


class Pairs:
    """A number a choice and a number a pair of choices, of genes in one block or with one in none, learned by ridge
    regression on targets [n, k]."""

    def __init__(self, space: SearchSpace, genomes: np.ndarray, targets: np.ndarray, penalty: float):
        blocks = [_block_of(name) for name in space.names]
        pairs = [
            (a, b)
            for b in range(len(space))
            for a in range(b)
            if blocks[a] == blocks[b] or None in (blocks[a], blocks[b])
        ]
        self.space, self.most = space, int(space.sizes.max())
        self.first, self.second = (np.concatenate([np.arange(len(space)), column]) for column in np.array(pairs).T)
        self.center = targets.mean(0)
        columns = self._columns(genomes)
        width = len(self.first) * self.most**2
        rows = np.repeat(np.arange(len(genomes)), columns.shape[1])
        kept = columns.ravel() < width
        design = csr_array((np.ones(kept.sum()), (rows[kept], columns.ravel()[kept])), (len(genomes), width))
        gram = (design @ design.T).toarray() + penalty * np.eye(len(genomes))
        self.table = np.append(
            design.T @ np.linalg.solve(gram, targets - self.center), [np.zeros(targets.shape[1])], axis=0
        )

    def _columns(self, genomes: np.ndarray) -> np.ndarray:
        """Where each gene's choice and each pair's stand in the table, the last place for what cannot matter."""
        active = self.space.active(genomes)
        both = active[:, self.first] & active[:, self.second]
        place = (np.arange(len(self.first)) * self.most + genomes[:, self.first]) * self.most + genomes[:, self.second]
        return np.where(both, place, len(self.first) * self.most**2)

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        return self.center + self.table[self._columns(genomes)].sum(1)


def _block_of(name: str) -> str | None:
    found = re.match(r"\D*\d+", name)
    return found.group() if found else None


def recorded(name: str, *, objectives: tuple[str, ...] = ("loss", "size"), seed: int = 0) -> Problem:
    """The problem of scripts/bench/tables/NAME.npz. The law is the table's, whatever the seed."""
    table = np.load(TABLES / f"{name.split(',')[0]}.npz")
    space, metrics = SearchSpace.from_dict(json.loads(str(table["space"]))), json.loads(str(table["metrics"]))
    genomes, values = table["genomes"].astype(np.int64), table["values"].astype(float)
    order = np.random.default_rng(0).permutation(len(genomes))
    held, known = np.split(order, [int(HELD_OUT * len(order))])
    costs = [o for o in objectives if o in ("size", "macs")]
    measured = [o for o in objectives if o not in costs]
    cost_columns, measured_columns = (values[:, [metrics.index(o) for o in some]] for some in (costs, measured))
    cost_law = Pairs(space, genomes, cost_columns, 1e-6)
    law = Pairs(space, genomes[known], measured_columns[known], PENALTY)
    residuals = measured_columns[held] - law(genomes[held])

    def exact(genomes: np.ndarray) -> np.ndarray:
        found = dict(zip([*costs, *measured], np.hstack([cost_law(genomes), law(genomes)]).T, strict=True))
        return np.stack([found[o] for o in objectives], axis=1)

    def add_noise(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
        noise = np.zeros_like(values)
        noise[:, [objectives.index(o) for o in measured]] = random.choice(residuals, len(values))
        return values + noise

    def cost(name: str) -> Callable[[np.ndarray], np.ndarray] | None:
        return (lambda genomes: cost_law(genomes)[:, costs.index(name)]) if name in costs else None

    listed = tuple(Objective(o, "max" if o == "accuracy" else "min", cost(o)) for o in objectives)
    framed = _framed(name, space, listed, exact, _diagonal(space, 2000, np.random.default_rng(seed)), 0.0)
    return replace(framed, noise=add_noise)


def of_law(name: str, make: Callable[..., Law], *, seed: int = 0, noise: float = 0.03) -> Problem:
    """A problem of architectures.py."""
    space, objectives, exact = make(seed=seed)
    return _framed(name, space, objectives, exact, _diagonal(space, 2000, np.random.default_rng(seed)), noise)


def _diagonal(space: SearchSpace, n: int, random: np.random.Generator) -> np.ndarray:
    level = random.random((n, 1))
    genomes = np.where(random.random((n, len(space))) < level, space.largest, space.smallest)
    return space.canonical(np.vstack([space.smallest, space.largest, genomes]))


def _framed(name, space, objectives, exact, diagonal, noise) -> Problem:
    """Corners: the best of each objective seen along the diagonal, and its 0.9 quantile there."""
    values = exact(np.vstack([diagonal, space.sample(1000, 0)]))
    costs = minimized(values, objectives)
    measured = np.array([objective.compute is None for objective in objectives])
    deviation = noise * np.quantile(costs, [0.1, 0.9], axis=0).T @ np.array([-0.4, 0.4]) * measured

    def add_noise(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return values + random.normal(size=values.shape) * deviation

    return Problem(name, space, objectives, exact, add_noise, costs.min(0), np.quantile(costs, 0.9, axis=0))


def families(seed: int = 0) -> dict[str, Callable[[], Problem]]:
    """The problems by name; each is built when it is called."""
    tables: dict[str, tuple[str, ...]] = {"": ("loss", "size"), ",accuracy,macs,size": ("accuracy", "macs", "size")}
    real = {
        f"{name}{suffix}": partial(recorded, f"{name}{suffix}", objectives=objectives)
        for name in ("digits_vit", "minilm")
        for suffix, objectives in tables.items()
        if (TABLES / f"{name}.npz").is_file()
    }
    three = ("quality", "size", "macs")
    kinds: dict[str, tuple[Callable[..., Problem], dict]] = {
        "add60": (transformer, {"blocks": 12, "layers": 3, "depth": "count", "noise": 0.02}),
        "pairs60": (transformer, {"blocks": 10, "layers": 4, "interactions": 0.3, "noise": 0.05}),
        "accuracy60": (
            transformer,
            {"blocks": 10, "layers": 4, "transform": "accuracy", "noise": 0.08, "interactions": 0.1},
        ),
        "pairs150": (transformer, {"blocks": 21, "layers": 4, "interactions": 0.2, "noise": 0.03}),
        "perplexity150": (
            transformer,
            {"blocks": 24, "layers": 4, "depth": "count", "transform": "perplexity", "interactions": 0.1},
        ),
        "add400": (transformer, {"blocks": 40, "layers": 6, "noise": 0.02}),
        "pairs400": (
            transformer,
            {"blocks": 40, "layers": 6, "depth": "count", "interactions": 0.4, "noise": 0.05},
        ),
        "three60": (
            transformer,
            {"blocks": 10, "layers": 4, "transform": "accuracy", "objectives": three, "noise": 0.03},
        ),
        "scrambled60": (scrambled, {"count": 60}),
        "scrambled150": (scrambled, {"count": 150}),
        "measured60": (scrambled, {"count": 60, "objectives": 3}),
        "formats150": (transformer, {"blocks": 21, "layers": 4, "architecture": 10.0, "transform": "steep"}),
    }
    laws = {"widths30": widths, "once_for_all": once_for_all, "cells96": typed_cells}
    return (
        real
        | {
            name: partial(make, name, seed=seed + at, **options)
            for at, (name, (make, options)) in enumerate(kinds.items())
        }
        | {name: partial(of_law, name, make, seed=seed) for name, make in laws.items()}
    )
