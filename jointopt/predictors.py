"""Learns an objective from evaluated genomes: Bayesian linear regression on what the choices have in common.

Quality is close to additive over genes, so a predictor is one number a choice, summed over the genes that matter. With
fewer evaluations than choices such a sum is only as good as its prior: choices are tied together by what they cost,
by the choice itself (the same format in another layer), by the gene's place, and by the block they are in. How much
each tie explains is found by maximum likelihood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky
from scipy.optimize import minimize

from jointopt.objectives import Objective
from search_spaces.space import Gene, SearchSpace

KNOTS = 5
"""Hat functions along the position of a gene among those of its kind."""
EXPECTED = {
    "choice": 0.1,
    "order": 0.1,
    "kind": 0.3,
    "alike": 0.3,
    "block": 0.1,
    "place": 0.1,
    "cost": 0.5,
    "prior": 0.5,
}
"""Share of an objective's variance that each group of features is expected to explain, before any evaluation."""
EXPECTED_NOISE = 0.01
EXPECTED_MISFIT = 0.02
"""The same of what no feature explains: alike for all evaluations, and the more the farther from the best."""
EXPECTATION_WIDTH = 1.5
"""Standard deviation of the logarithms of those shares."""
LATEST = 200
"""Evaluations, the last ones, by which scale and shares are chosen; all are learned from."""
TOGETHER = 512
"""Genomes that are summed at a time, so that what is worked on stays in the processor's cache."""
MARGINS = 0.1, 0.5, 2.0
"""Where a logarithm's pole lies: these shares of the distance from the extreme to the median, beyond the extreme."""
DOUBT = 2.0
"""Extra log evidence that a scale which stretches the bad end must show before it is preferred, since it squeezes the
good end, where the search goes: a few evaluations are often a little likelier on such a scale by chance."""
LIMIT = 1e100
"""Values beyond are taken as this, so that their squares are finite."""
STARTLING = 3.0
"""Standard deviations from what all others foretell, from which on a value is not believed: at most a tenth of them."""


class Choices:
    """Every choice of every gene as a slot of one long vector, and what slots have in common.

    Attributes:
        signs: of the objectives, by which less is better [objectives].
        measured, exact: columns of the objectives that are measured, and of those that are computed.
        gene, choice: of each slot [slots].
        offsets: the first slot of each gene [genes].
        costs: what each slot adds to each computed objective, by least squares [slots, computed]; in units in which
            the computed objectives have unit variance.
        groups: name -> matrix [slots, features], from slots to features that are thought to have an effect.
    """

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective]):
        self.space = space
        self.objectives = objectives
        self.signs = np.array([objective.sign for objective in objectives])
        self.measured = [at for at, objective in enumerate(objectives) if objective.compute is None]
        self.exact = [at for at, objective in enumerate(objectives) if objective.compute is not None]
        self.gene = np.repeat(np.arange(len(space)), space.sizes)
        self.offsets = np.concatenate([[0], np.cumsum(space.sizes)[:-1]])
        self.choice = np.arange(len(self.gene)) - self.offsets[self.gene]
        self._measure_costs()
        self.groups = self._grouped()

    def prior(self, estimate: np.ndarray) -> np.ndarray:
        """An estimate of each slot's effect [slots] as features [slots, features]: itself, and each slot's part of it,
        so that what the estimate takes for large may be far off."""
        return np.column_stack([estimate, np.diag(estimate)])

    def slots(self, genomes: np.ndarray) -> np.ndarray:
        """For each gene the slot it is in, `len(self.gene)` where it cannot matter; [n, genes]."""
        return np.where(self.space.active(genomes), self.offsets + genomes, len(self.gene))

    def sums(self, genomes: np.ndarray, table: np.ndarray) -> np.ndarray:
        """The sum of a table [slots] or [slots, k] over each genome's choices: [n] or [n, k]."""
        padded = np.concatenate([table, np.zeros_like(table[:1])])
        total = np.zeros((len(genomes), *table.shape[1:]))
        for at in range(0, len(genomes), TOGETHER):
            slots, part = self.slots(genomes[at : at + TOGETHER]), slice(at, at + TOGETHER)
            if table.ndim == 1:
                total[part] = padded[slots].sum(1)
            else:
                for column in slots.T:
                    total[part] += padded[column]
        return total

    def encoded(self, genomes: np.ndarray) -> np.ndarray:
        """One column a slot, 1 where a gene that matters has that choice; [n, slots]."""
        encoded = np.zeros((len(genomes), len(self.gene) + 1))
        np.put_along_axis(encoded, self.slots(genomes), 1.0, axis=1)
        return encoded[:, :-1]

    def compute(self, genomes: np.ndarray) -> np.ndarray:
        """The computed objectives, exact, in their own units: [n, computed]."""
        columns = [self.objectives[at].values(genomes) for at in self.exact]
        return np.stack(columns, axis=1) if columns else np.empty((len(genomes), 0))

    def exact_tables(self) -> np.ndarray:
        """What each slot adds to each objective, less is better [objectives, slots]; 0 for those that are measured."""
        tables = np.zeros((len(self.objectives), len(self.gene)))
        for column, at in enumerate(self.exact):
            tables[at] = self.costs[:, column] * self.signs[at]
        return tables

    def _measure_costs(self) -> None:
        random = np.random.default_rng(0)
        n = 2 * len(self.gene) + 100
        level = random.random((n, 1))
        genomes = np.where(random.random((n, len(self.space))) < level, self.space.largest, self.space.smallest)
        drawn = random.integers(0, self.space.sizes, genomes.shape)
        genomes = self.space.canonical(np.where(random.random(genomes.shape) < 0.5, drawn, genomes))
        values = self.compute(genomes)
        center, spread = values.mean(0), values.std(0)
        encoded = self.encoded(genomes)
        gram = encoded.T @ encoded + 1e-3 * np.eye(len(self.gene))
        self.costs = np.linalg.solve(gram, encoded.T @ ((values - center) / np.where(spread > 0, spread, 1.0)))

    @cached_property
    def kinds(self) -> np.ndarray:
        """A number for each gene, the same where names differ in numbers only and choices not at all: [genes]."""
        return _numbered([(re.sub(r"\d+", "#", gene.name), gene.choices) for gene in self.space.genes])

    @cached_property
    def alike(self) -> np.ndarray:
        """A number for each gene, the same where choices mean the same: a number format does wherever it stands, and a
        number in genes of one kind (2 blocks are not 2 heads); [genes]."""
        named = [all(isinstance(choice, str) for choice in gene.choices) for gene in self.space.genes]
        genes = zip(self.space.genes, self.kinds.tolist(), named, strict=True)
        return _numbered([gene.choices if words else kind for gene, kind, words in genes])

    @cached_property
    def share(self) -> np.ndarray:
        """How much more of the costs hangs on a gene than on the average one, as a square root: what is large has
        larger effects, but not in proportion; [genes]."""
        if not self.exact:
            return np.ones(len(self.space))
        spans = np.zeros(len(self.space))
        for costs in self.costs.T:
            high = np.maximum.reduceat(costs, self.offsets)
            low = np.minimum.reduceat(costs, self.offsets)
            spans += (high - low) / max(float((high - low).mean()), 1e-12)
        return np.sqrt(np.clip(spans / len(self.exact), 0.1, 10.0))

    @cached_property
    def level(self) -> np.ndarray:
        """Each slot's place among its gene's choices, above 0 at the small end to 1 at the large one: [slots].

        A gene that cannot matter counts 0: there is less of its layer than in the smallest.
        """
        level = np.zeros(len(self.gene))
        for gene, (start, size) in enumerate(zip(self.offsets, self.space.sizes, strict=True)):
            slots = slice(start, start + size)
            level[slots] = _levels(self.space.genes[gene], self.costs[slots].mean(1) if self.exact else None)
        return level

    def _grouped(self) -> dict[str, np.ndarray]:
        genes = self.space.genes
        kinds = self.kinds
        blocks = _numbered([_block(gene.name) for gene in genes])
        share = self.share[self.gene]
        one = np.ones(len(self.gene))
        groups = {
            "choice": np.diag(np.sqrt(share)),
            "order": _scattered(self.gene, self.level * np.sqrt(share)),
            "kind": _scattered(self._choices_of(kinds), share),
            "alike": _scattered(self._choices_of(self.alike), one),
            "block": _scattered(blocks[self.gene], self.level * share),
            "place": self._placed(kinds),
        }
        if self.exact:
            groups["cost"] = self.costs
        return groups

    def _placed(self, kinds: np.ndarray) -> np.ndarray:
        """A kind's choices at places along its genes: hat functions between KNOTS knots."""
        place = np.zeros(len(kinds))
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            place[members] = np.linspace(0, KNOTS - 1, len(members)) if len(members) > 1 else 0
        columns = []
        for knot in range(KNOTS):
            hat = np.maximum(0, 1 - np.abs(place - knot))[self.gene] * np.sqrt(self.share[self.gene])
            columns.append(_scattered(self._choices_of(kinds), hat))
        return np.hstack(columns)

    def _choices_of(self, groups: np.ndarray) -> np.ndarray:
        """A number for each choice of a group of genes, given the group of each gene: [slots]."""
        return groups[self.gene] * int(self.space.sizes.max()) + self.choice


def _levels(gene: Gene, costs: np.ndarray | None) -> np.ndarray:
    """Places of a gene's choices up to 1: by number where all are numbers, else by what they cost."""
    numbers = all(isinstance(choice, int | float) for choice in gene.choices)
    keys = np.array(gene.choices, dtype=float) if numbers else costs
    if keys is None:
        return np.ones(len(gene.choices))
    return (np.argsort(np.argsort(keys, kind="stable"), kind="stable") + 1) / len(gene.choices)


def _block(name: str) -> str:
    """The name up to its first number: "block3.mlp" is of "block3"."""
    found = re.match(r"\D*\d+", name)
    return found.group() if found else name


def _numbered(keys: Sequence) -> np.ndarray:
    found: dict = {}
    return np.array([found.setdefault(key, len(found)) for key in keys])


def _scattered(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[slots, features] with `values` at the column of each slot's key."""
    _, column = np.unique(columns, return_inverse=True)
    matrix = np.zeros((len(columns), column.max() + 1))
    matrix[np.arange(len(columns)), column] = values
    return matrix


def _remoteness(targets: np.ndarray) -> np.ndarray:
    """Square of how far each is from the best, 1 for one that is as far as the mean: [n].

    What sums over genes miss grows like this. Interactions vanish where nothing is lost, so that the best evaluations
    tell of small effects that those of hopeless genomes would drown.
    """
    away = targets - targets.min()
    return (away / (away.mean() or 1.0)) ** 2


def _factored(variances: np.ndarray, grams: np.ndarray, remoteness: np.ndarray) -> np.ndarray:
    """Cholesky factor of the covariance of the targets; the last two of the variances are of what nothing explains: in
    proportion to `remoteness` [n], and alike for all."""
    unexplained = variances[-2] * remoteness + variances[-1] + 1e-8
    return cholesky(np.tensordot(variances[:-2], grams, 1) + np.diag(unexplained), lower=True)


@dataclass(frozen=True)
class Scale:
    """A monotone function under which an objective may be closer to additive, and its inverse.

    Attributes:
        doubt: by how much the logarithm of its evidence has to be above that of others to be preferred.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    log_slope: Callable[[np.ndarray], np.ndarray]
    doubt: float = 0.0


def scales(costs: np.ndarray) -> list[Scale]:
    """The scales to choose from, for `costs` (less is better) as they were observed: as they are, drawn out at the good
    end, and drawn out at the bad one."""
    found = [Scale("linear", lambda y: y, lambda z: z, np.zeros_like)]
    low, middle, high = float(costs.min()), float(np.median(costs)), float(costs.max())
    if middle > low:
        found += [_logarithm(low - margin * (middle - low), 1) for margin in MARGINS]
    if low > 0 and high > 2 * low:
        found.append(_logarithm(0.0, 1))
    if high > middle:
        found += [_logarithm(high + margin * (high - middle), -1) for margin in MARGINS]
    if high < 0 and low < 2 * high:
        found.append(_logarithm(0.0, -1))
    return found


def _logarithm(end: float, side: int) -> Scale:
    """The logarithm of how far costs are above an end (side 1), or below it (side -1)."""
    tiny = np.finfo(float).tiny

    def log(y: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(side * (y - end), tiny))

    return Scale(
        f"log {'above' if side > 0 else 'below'} {end:.6g}",
        lambda y: side * log(y),
        lambda z: end + side * np.exp(np.minimum(side * z, 700.0)),
        lambda y: -log(y),
        DOUBT if side < 0 else 0.0,
    )


class Predictor:
    """Genome -> one measured objective, less is better, with what is not known of it.

    Args:
        genomes, costs: what was evaluated, [n, genes] and [n].
        prior: further features [slots, features], see `Choices.prior`.
        transforms: whether other scales than the objective's own are tried.

    Attributes:
        scale: the scale on which the objective was learned, the likeliest of `scales`, but for their `doubt`.
        weights: group of features -> the share of variance that it explains.
        noise: of each evaluation, the variance that nothing explains [n].
        table: posterior mean of each slot's effect, on that scale.
    """

    def __init__(
        self,
        choices: Choices,
        genomes: np.ndarray,
        costs: np.ndarray,
        prior: np.ndarray | None = None,
        transforms: bool = True,
    ):
        costs = np.clip(costs, -LIMIT, LIMIT)
        self.choices = choices
        groups = choices.groups if prior is None else {**choices.groups, "prior": prior}
        self._maps: dict[str, np.ndarray] = {}
        self._features: dict[str, np.ndarray] = {}
        self._offsets: dict[str, np.ndarray] = {}
        encoded = choices.encoded(genomes)
        for name, matrix in groups.items():
            features = encoded @ matrix
            norm = float(np.sqrt(features.var(0).sum())) or 1.0
            self._maps[name] = matrix / norm
            self._offsets[name] = features.mean(0) / norm
            self._features[name] = features / norm - self._offsets[name]
        grams = np.stack([features @ features.T for features in self._features.values()])
        late = slice(-LATEST, None)
        tried = scales(costs)[: None if transforms else 1]
        fits = [self._fit(scale, costs[late], grams[:, late, late]) for scale in tried]
        _, self.scale, variances, self._mean, self._spread = min(fits, key=lambda fit: fit[0] + fit[1].doubt)
        self._standard = (self.scale.forward(costs) - self._mean) / self._spread
        self.weights = dict(zip(groups, variances[:-2].tolist(), strict=True))
        remoteness = _remoteness(self._standard)
        self.noise = variances[-2] * remoteness + variances[-1]
        self._factor = _factored(variances, grams, remoteness)
        self.table, self._constant = self._explained(self._standard)
        high, low = self._standard.max(), self._standard.min()
        self._bounds = low - 1.5 * (high - low) - 0.1, high + 1.5 * (high - low) + 0.1

    def surprises(self) -> np.ndarray:
        """How far each value is from what all others foretell, in standard deviations [n] (leave-one-out, Rasmussen and
        Williams 2006, eqs. 5.10 to 5.12)."""
        inverse = cho_solve((self._factor, True), np.eye(len(self._standard)))
        return np.abs(inverse @ self._standard) / np.sqrt(np.diag(inverse))

    def _fit(self, scale: Scale, costs: np.ndarray, grams: np.ndarray) -> tuple:
        """How unlikely the costs are on a scale; the scale; the variances that make them least so; mean and spread."""
        targets = scale.forward(costs)
        mean, spread = targets.mean(), targets.std() or 1.0
        standard = (targets - mean) / spread
        jacobian = scale.log_slope(costs).sum() - len(costs) * np.log(spread)
        remoteness = _remoteness(standard)
        centers = np.log([*(EXPECTED[name] for name in self._features), EXPECTED_MISFIT, EXPECTED_NOISE])

        def unlikely(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            """The negative logarithm of the evidence, and its slopes (Rasmussen and Williams 2006, eqs. 5.8, 5.9)."""
            variances = np.exp(parameters)
            factor = _factored(variances, grams, remoteness)
            solved = cho_solve((factor, True), standard)
            inverse = cho_solve((factor, True), np.eye(len(costs)))
            value = 0.5 * standard @ solved + np.log(np.diag(factor)).sum()
            inner = inverse - np.outer(solved, solved)
            unexplained = np.diag(inner)
            slopes = np.array([*((inner * gram).sum() for gram in grams), unexplained @ remoteness, unexplained.sum()])
            drift = (parameters - centers) / EXPECTATION_WIDTH**2
            value += 0.5 * (drift * (parameters - centers)).sum()
            return value, 0.5 * slopes * variances + drift

        found = minimize(
            unlikely, centers, jac=True, method="L-BFGS-B", bounds=[(-12, 4)] * len(centers), options={"maxiter": 25}
        )
        return found.fun - jacobian, scale, np.exp(found.x), mean, spread

    def _explained(self, standard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tables and constants that explain standardized targets [n, ...]."""
        solved = cho_solve((self._factor, True), standard)
        effects = {name: self.weights[name] * (x.T @ solved) for name, x in self._features.items()}
        return self._summed(effects)

    def _summed(self, effects: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Tables [slots, ...] and constants [...] of the effects of features [features, ...]."""
        table = sum(self._maps[name] @ effect for name, effect in effects.items())
        constant = sum(-self._offsets[name] @ effect for name, effect in effects.items())
        return np.asarray(table), np.asarray(constant)

    def draw(self, n: int, boldness: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tables [slots, n] and constants [n] drawn from the posterior (Matheron's rule), drawn towards its mean.

        Args:
            boldness: 1 for the posterior itself, 0 for its mean alone.
        """
        effects = {
            name: np.sqrt(self.weights[name]) * random.normal(size=(x.shape[1], n))
            for name, x in self._features.items()
        }
        tables, constants = self._summed(effects)
        at_known = np.sum([x @ effects[name] for name, x in self._features.items()], axis=0)
        noise = np.sqrt(self.noise)[:, None] * random.normal(size=at_known.shape)
        corrections, shifts = self._explained(self._standard[:, None] - at_known - noise)
        tables, constants = tables + corrections, constants + shifts
        mean = self.table[:, None]
        return mean + boldness * (tables - mean), self._constant + boldness * (constants - self._constant)

    def values(self, sums: np.ndarray, constants: np.ndarray | float | None = None) -> np.ndarray:
        """Costs, in the objective's own unit, from sums of a table (default constant: the mean's)."""
        constants = self._constant if constants is None else constants
        standard = np.clip(sums + constants, *self._bounds)
        return self.scale.inverse(standard * self._spread + self._mean)

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        """Predicted costs [n], in the objective's own unit, its sign turned so that less is better."""
        return self.values(self.choices.sums(genomes, self.table))


def robust(
    choices: Choices, genomes: np.ndarray, costs: np.ndarray, prior: np.ndarray | None = None
) -> tuple[Predictor, np.ndarray]:
    """A `Predictor` of the costs that others bear out, and which these are [n]: one evaluation that went wrong (data
    that did not arrive, a latency taken while something else ran) would be learned as its genome's choices' effect."""
    believed = np.ones(len(costs), dtype=bool)
    while True:
        predictor = Predictor(choices, genomes[believed], costs[believed], prior)
        surprises = predictor.surprises()
        left = len(costs) // 10 - int((~believed).sum())
        startling = np.argsort(-surprises)[: max(left, 0)]
        startling = startling[surprises[startling] > STARTLING]
        if not len(startling):
            return predictor, believed
        believed[np.flatnonzero(believed)[startling]] = False
