"""Optimizers that people would plug in instead, by ask and tell as jointopt's own strategies. For comparison only.

`pip install jointopt[bench]` brings pymoo and optuna. All of them see the same genomes and values as `guided`; LINAS is
given the exact objectives too. pymoo and Optuna have no such means and learn them from the values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import optuna
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.problems.static import StaticProblem
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVR

from jointopt.objectives import Objective, minimized
from jointopt.strategies import Strategy
from jointopt.strategies.genetic import evolve, order
from search_spaces.space import SearchSpace

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Pymoo:
    """pymoo's NSGA-II with its operators for integers, population 50, on all genes whether they matter or not."""

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], seed: int):
        self.space, self.objectives = space, objectives
        upper = space.sizes - 1
        self.problem = Problem(n_var=len(space), n_obj=len(objectives), xl=0 * upper, xu=upper, vtype=int)
        self.algorithm = NSGA2(
            pop_size=50,
            sampling=IntegerRandomSampling(),
            crossover=SBX(prob=0.9, eta=3.0, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        )
        self.algorithm.setup(self.problem, termination=("n_gen", 10**6), seed=seed, verbose=False)

    def ask(self, n: int) -> np.ndarray:
        """A whole generation, whatever n."""
        self.asked = self.algorithm.ask()
        return self.space.canonical(self.asked.get("X").astype(np.int64))

    def tell(self, genomes: np.ndarray, values: np.ndarray) -> None:
        static = StaticProblem(self.problem, F=minimized(values, self.objectives))
        Evaluator().eval(static, self.asked)
        self.algorithm.tell(infills=self.asked)


class Optuna:
    """One of Optuna's samplers. Genes of numbers are suggested as integers in their order, others as categories; those
    that cannot matter are not suggested."""

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], sampler: optuna.samplers.BaseSampler):
        self.space = space
        directions = ["minimize" if objective.direction == "min" else "maximize" for objective in objectives]
        self.study = optuna.create_study(directions=directions, sampler=sampler)

    def ask(self, n: int) -> np.ndarray:
        self.trials = [self.study.ask() for _ in range(n)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.array([self._suggested(trial) for trial in self.trials])

    def _suggested(self, trial: optuna.Trial) -> np.ndarray:
        chosen: dict = {}
        for gene in self.space.genes:
            if all(name in chosen and chosen[name] in allowed for name, allowed in gene.requires.items()):
                if all(isinstance(choice, int | float) for choice in gene.choices) and len(gene.choices) > 2:
                    chosen[gene.name] = gene.choices[trial.suggest_int(gene.name, 0, len(gene.choices) - 1)]
                else:
                    chosen[gene.name] = trial.suggest_categorical(gene.name, gene.choices)
        return self.space.encode(chosen)

    def tell(self, genomes: np.ndarray, values: np.ndarray) -> None:
        for trial, row in zip(self.trials, values, strict=True):
            self.study.tell(trial, row.tolist())


class Linas(Strategy):
    """LINAS (arXiv 2205.10358) as published: 50 random genomes; ridge or RBF-SVR on one-hot genes, by cross-validation;
    NSGA-II for 10,000 predictions; its best 50 unseen genomes evaluated; repeat. Exact objectives are computed."""

    def ask(self, n: int) -> np.ndarray:
        return super().ask(50)

    def propose(self, n: int):
        if not len(self.told):
            return
        models = {at: self._learned(at) for at, o in enumerate(self.objectives) if o.compute is None}

        def foresee(genomes: np.ndarray) -> np.ndarray:
            columns = [
                models[at].predict(self._one_hot(genomes)) if at in models else objective.compute(genomes)
                for at, objective in enumerate(self.objectives)
            ]
            return minimized(np.stack(columns, axis=1), self.objectives)

        start = self.told[np.argsort(order(self.costs()))[:50]]
        seen: list[np.ndarray] = []

        def remembered(genomes: np.ndarray) -> np.ndarray:
            seen.append(genomes)
            return foresee(genomes)

        evolve(self.space, start, remembered, 200, self.random)
        late = np.unique(np.vstack(seen[-40:]), axis=0)
        late = late[[genome.tobytes() not in self._seen for genome in late]]
        yield from late[np.argsort(order(foresee(late)))]

    def _one_hot(self, genomes: np.ndarray) -> np.ndarray:
        return np.concatenate([genomes[:, [at]] == np.arange(k) for at, k in enumerate(self.space.sizes)], axis=1) * 1.0

    def _learned(self, at: int):
        inputs, targets = self._one_hot(self.told), self.values[:, at]
        scale = targets.std() or 1.0
        candidates = [Ridge(alpha=1.0), SVR(C=10.0 * scale, epsilon=0.01 * scale, gamma="scale")]
        scores = [cross_val_score(model, inputs, targets, cv=5).mean() for model in candidates]
        return candidates[int(np.argmax(scores))].fit(inputs, targets)


def _optuna(make: Callable[[int], optuna.samplers.BaseSampler]) -> Callable:
    def peer(space: SearchSpace, objectives: Sequence[Objective], seed: int) -> Optuna:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Optuna(space, objectives, make(seed))

    return peer


PEERS: dict[str, Callable] = {
    "pymoo_nsga2": Pymoo,
    "linas": Linas,
    "optuna_nsga2": _optuna(lambda seed: optuna.samplers.NSGAIISampler(population_size=50, seed=seed)),
    "optuna_tpe": _optuna(lambda seed: optuna.samplers.TPESampler(multivariate=False, seed=seed)),
    "optuna_gp": _optuna(lambda seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)),
}
