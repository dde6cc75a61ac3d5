"""Picks genomes for a batch: for the hypervolume they add together, in proportion to the time each of them takes.

A genome that agrees on the first parts of the model with one that was picked takes the time of the rest alone
(`jointopt.evaluation.sharing`): what gains a little less and takes far less time goes before, as by expected
improvement per second (Snoek, Larochelle, Adams 2012).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jointopt.objectives import non_dominated
from search_spaces.space import SearchSpace

POINTS = 2000
UNSHARED = 0.03
"""Time of a genome that shares all parts, of that of one that shares none."""


class Areas:
    """What candidates would add to fronts of one or two objectives, one front for each draw.

    Args:
        told: rows [draws, n, objectives].
        candidates: [draws, n, objectives].
        reference: the corner that is measured from.
    """

    def __init__(self, told: np.ndarray, candidates: np.ndarray, reference: np.ndarray):
        self.fronts = [each[non_dominated(each)] for each in told]
        self.candidates, self.reference = candidates, reference

    def gains(self) -> np.ndarray:
        """Of each candidate, mean over the draws [n]."""
        pairs = zip(self.fronts, self.candidates, strict=True)
        return np.mean([_gains(front, rows, self.reference) for front, rows in pairs], axis=0)

    def add(self, index: int) -> None:
        pairs = zip(self.fronts, self.candidates, strict=True)
        self.fronts = [_joined(front, rows[index]) for front, rows in pairs]


class Points:
    """The same for three objectives and more, where volumes are counted in random points of the box."""

    def __init__(self, told: np.ndarray, candidates: np.ndarray, reference: np.ndarray, random: np.random.Generator):
        fronts = [each[non_dominated(each)] for each in told]
        low = candidates.min(axis=(0, 1))
        points = low + (reference - low) * random.random((20 * POINTS, len(reference)))
        points = points[~_dominated(points, fronts[0])][:POINTS]
        self.covers = np.stack([_dominated_by_each(points, each) for each in candidates])
        self.free = np.stack([~_dominated(points, front) for front in fronts])

    def gains(self) -> np.ndarray:
        """Of each candidate, mean over the draws [n]."""
        return np.mean([each[:, left].sum(1) for each, left in zip(self.covers, self.free, strict=True)], axis=0)

    def add(self, index: int) -> None:
        self.free &= ~self.covers[:, index]


class Times:
    """How long each genome takes, as a share of its time alone, where it need not compute the first parts that it has
    in common with a picked one.

    Args:
        parts: see `GuidedSearch`.
    """

    def __init__(self, space: SearchSpace, parts: Sequence[Sequence[int]], genomes: np.ndarray):
        coded = np.where(space.active(genomes), genomes, -1)
        random = np.random.default_rng(0)
        # Equal numbers for equal choices: sums of random multiples, wrapped around.
        multiples = random.integers(1, 2**63, len(space), dtype=np.uint64)
        hashed = coded.astype(np.uint64) * multiples
        self.parts = np.stack([hashed[:, list(part)].sum(1) for part in parts], axis=1)
        self.there = np.stack([(coded[:, list(part)] >= 0).any(1) for part in parts[1:]], axis=1)
        self.shared = np.zeros(len(genomes))

    def each(self) -> np.ndarray:
        """[n], from UNSHARED to 1."""
        return UNSHARED + (1 - UNSHARED) * (1 - self.shared / np.maximum(self.there.sum(1), 1))

    def add(self, index: int) -> None:
        same = np.cumprod(self.parts == self.parts[index], axis=1)[:, 1:]
        self.shared = np.maximum(self.shared, (same * self.there).sum(1))


def pick(volume: Areas | Points, handicap: np.ndarray, times: Times | None, n: int) -> list[int]:
    """Indices of n candidates, each the one that adds most to those before for its time.

    Args:
        handicap: what counts against each [candidates], far less than any gain.
        times: None where all take the same.
    """
    picked: list[int] = []
    while len(picked) < n:
        worth = volume.gains() - handicap
        if times is not None:
            worth = np.where(worth > 0, worth / times.each(), worth)
        worth[picked] = -np.inf
        picked.append(int(worth.argmax()))
        volume.add(picked[-1])
        if times is not None:
            times.add(picked[-1])
    return picked


def crossed(space: SearchSpace, parts: Sequence[Sequence[int]], genomes: np.ndarray, most: int) -> np.ndarray:
    """Genomes that begin as one of `genomes` and go on as another: about `most`, changing over at places spread
    evenly."""
    count = len(genomes)
    places = np.unique(np.linspace(1, len(parts) - 1, max(1, most // max(count**2, 1))).round().astype(int))
    found = np.empty((len(places), count, count, len(space)), dtype=np.int64)
    found[:] = genomes
    for mixed, place in zip(found, places, strict=True):
        first = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts[:place]])
        mixed[:, :, first] = genomes[:, None, first]
    return space.canonical(found.reshape(-1, len(space)))


def _dominated_by_each(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[rows, points], whether a row is at least as good as a point everywhere."""
    found = np.ones((len(rows), len(points)), dtype=bool)
    for column in range(points.shape[1]):
        found &= rows[:, column, None] <= points[:, column]
    return found


def _dominated(points: np.ndarray, front: np.ndarray) -> np.ndarray:
    return np.any(_dominated_by_each(points, front), axis=0)


def _joined(front: np.ndarray, row: np.ndarray) -> np.ndarray:
    if (front <= row).all(axis=1).any():
        return front
    return np.vstack([front[~(row <= front).all(axis=1)], row])


def _gains(front: np.ndarray, candidates: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Length or area that each candidate alone would add to a front of one or two objectives: [n]."""
    if candidates.shape[1] == 1:
        return np.clip(min(front.min(initial=np.inf), reference[0]) - candidates[:, 0], 0, None)
    front = front[(front < reference).all(1)]
    front = front[np.argsort(front[:, 0])]
    left = np.concatenate([[-np.inf], front[:, 0]])
    right = np.concatenate([front[:, 0], reference[:1]])
    height = np.concatenate([reference[1:], front[:, 1]])
    x, y = candidates[:, :1], candidates[:, 1:]
    width = np.clip(right - np.maximum(left, x), 0, None)
    return (width * np.clip(height - y, 0, None)).sum(1)
