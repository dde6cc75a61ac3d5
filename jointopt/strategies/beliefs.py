"""What a guided search believes of the objectives, and what it asks for by that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jointopt.predictors import LIMIT, Choices, Predictor, robust
from jointopt.strategies.batches import Areas, Points, Times, pick
from jointopt.strategies.feasible import Feasible
from jointopt.strategies.genetic import handicapped

BOLDNESS = 0.3
"""How far the drawn functions go from the mean, as a share of the posterior's width. At 1 a search in hundreds of
dimensions explores for ever."""
TELLING = 0.01
"""Of the largest computed cost that was told: below it a ratio counts for little."""


class Beliefs:
    """What is believed of the objectives after some evaluations: a mean, and functions drawn from around it.

    Args:
        told: evaluated genomes, with their `costs` [n, objectives], less is better.
        priors: column of a measured objective -> features of its prior, see `Choices.prior`.
        draws: how many functions.

    Attributes:
        costs: those told, but for what no other evaluation bears out: there what is foreseen.
    """

    def __init__(
        self,
        choices: Choices,
        feasible: Feasible,
        told: np.ndarray,
        costs: np.ndarray,
        priors: Mapping[int, np.ndarray],
        draws: int,
        random: np.random.Generator,
    ):
        self.choices, self.feasible, self.random = choices, feasible, random
        self.told, self.costs, self.draws = told, costs.copy(), draws
        self.predictors: dict[int, Predictor] = {}
        for at in choices.measured:
            predictor, believed = robust(choices, told, costs[:, at], priors.get(at))
            self.predictors[at], wrong = predictor, ~believed
            self.costs[wrong, at] = np.clip(
                predictor(told[wrong]), costs[believed, at].min(), costs[believed, at].max()
            )
        self.drawn = {at: p.draw(draws, BOLDNESS, random) for at, p in self.predictors.items()}
        self._by_ratio = [at for at in choices.exact if 0 <= costs[:, at].min() < costs[:, at].max()]
        self._exploding = [at for at in self.predictors if _explodes(self.costs[:, at])]

    def foreseen(self, genomes: np.ndarray) -> np.ndarray:
        """Costs [n, objectives] under the mean."""
        values = self._with_exact(genomes, np.empty((len(genomes), len(self.choices.signs))))
        for at, predictor in self.predictors.items():
            values[:, at] = predictor(genomes)
        return values

    def constrained(self, genomes: np.ndarray) -> np.ndarray:
        """The same on the scales by which they are compared, with what exceeds a constraint worse than all that do
        not."""
        values = self.foreseen(genomes)
        excess = self.feasible.excess(genomes) + self.feasible.measured_excess(values * self.choices.signs)
        return handicapped(self._compared(values), excess)

    def imagined(self, genomes: np.ndarray) -> np.ndarray:
        """Costs [draws, n, objectives] under each draw."""
        shape = (self.draws, len(genomes), len(self.choices.signs))
        values = self._with_exact(genomes, np.empty(shape))
        for at, predictor in self.predictors.items():
            tables, constants = self.drawn[at]
            values[:, :, at] = predictor.values(self.choices.sums(genomes, tables), constants).T
        return values

    def _with_exact(self, genomes: np.ndarray, values: np.ndarray) -> np.ndarray:
        exact = self.choices.exact
        values[..., exact] = self.choices.compute(genomes) * self.choices.signs[exact]
        return values

    def mean_tables(self) -> np.ndarray:
        """What each slot adds to each objective: [objectives, slots], each objective in a unit of its own."""
        tables = self.choices.exact_tables()
        for at, predictor in self.predictors.items():
            tables[at] = predictor.table
        return tables

    def drawn_tables(self) -> Iterable[np.ndarray]:
        """The same under each draw."""
        for draw in range(self.draws if self.drawn else 0):
            tables = self.mean_tables()
            for at, (drawn, _) in self.drawn.items():
                tables[at] = drawn[:, draw]
            yield tables

    def _compared(self, values: np.ndarray) -> np.ndarray:
        """Values [..., objectives] on the scales by which they are compared. Computed costs are compared by ratio:
        from 10 MB to 9 is as far as from 100 to 90. What explodes is on its predictor's scale: in its own unit a few
        hopeless genomes would make all the others look alike."""
        compared = values.copy()
        for at in self._by_ratio:
            compared[..., at] = np.log(np.maximum(values[..., at], 0) + TELLING * self.costs[:, at].max())
        for at in self._exploding:
            compared[..., at] = self.predictors[at].scale.forward(np.clip(values[..., at], -LIMIT, LIMIT))
        return compared

    def picked(self, found: np.ndarray, n: int, parts: Sequence[Sequence[int]] = ()) -> list[int]:
        """Indices of up to n genomes, picked one by one: each time the one that is expected to add most hypervolume to
        what was told and picked, divided by its time where it shares `parts` with others. A genome that exceeds a
        constraint adds nothing; where none adds anything, the one that exceeds least is next."""
        if not len(found):
            return []
        costs = self._compared(self.costs)
        low, high = costs.min(0), costs.max(0)
        imagined = self.imagined(np.vstack([self.told, found]))
        excess = self.feasible.measured_excess(imagined * self.choices.signs)
        values = (self._compared(imagined) - low) / np.where(high > low, high - low, 1.0)
        reference = np.full(values.shape[2], 1.05)
        values[excess > 0] = reference
        handicap = 1e-9 * excess[:, len(self.told) :].mean(0) / max(excess.max(), 1e-300)
        told, candidates = values[:, : len(self.told)], values[:, len(self.told) :]
        if len(reference) > 2:
            volume: Areas | Points = Points(told, candidates, reference, self.random)
        else:
            volume = Areas(told, candidates, reference)
        times = Times(self.choices.space, parts, found) if parts else None
        return pick(volume, handicap, times, min(n, len(found)))


def _explodes(costs: np.ndarray) -> bool:
    """Whether the worst is more than ten times as far from the best as the median is."""
    return bool(np.ptp(costs) > 10 * (np.median(costs) - costs.min()) > 0)
