"""Learns an objective from evaluated genomes: scikit-learn models, the best of them by cross-validated rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import kendalltau
from sklearn.base import RegressorMixin
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from search_spaces.space import SearchSpace

CANDIDATES: dict[str, Callable[[], RegressorMixin]] = {
    "bayesian_ridge": BayesianRidge,
    "rbf_svr": lambda: make_pipeline(StandardScaler(), SVR(C=10.0, epsilon=0.01)),
    "quadratic_kernel_ridge": lambda: make_pipeline(StandardScaler(), KernelRidge(alpha=1.0, kernel="poly", degree=2)),
}
FOLDS = 5


def features(space: SearchSpace, genomes: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """One column a choice (1 where a gene that matters has it), then the computed objectives, standardized."""
    genomes = np.atleast_2d(genomes)
    offsets = np.concatenate([[0], np.cumsum(space.sizes)[:-1]])
    encoded = np.zeros((len(genomes), int(space.sizes.sum())))
    rows, columns = np.nonzero(space.active(genomes))
    encoded[rows, offsets[columns] + genomes[rows, columns]] = 1.0
    return np.hstack([encoded, computed])


class Predictor:
    """Genome -> one objective, from those that were evaluated.

    The model with the best rank correlation (Kendall's tau) over five folds is taken, then fitted to all. Values that
    span more than a factor of ten and are all of one sign are learned as logarithms.

    Attributes:
        chosen: its name in `CANDIDATES`.
        rank_correlation: its cross-validated tau, between -1 and 1.
    """

    def __init__(self, inputs: np.ndarray, values: np.ndarray):
        self._sign, self._logarithmic = _scale_of(values)
        targets = self._forward(values)
        self._mean, self._spread = targets.mean(), targets.std() or 1.0
        standard = (targets - self._mean) / self._spread
        scores = {name: _cross_validated(make, inputs, standard) for name, make in CANDIDATES.items()}
        self.chosen = max(scores, key=lambda name: scores[name])
        self.rank_correlation = scores[self.chosen]
        self._model = _fitted(CANDIDATES[self.chosen], inputs, standard)
        self._bounds = targets.min() - 3 * self._spread, targets.max() + 3 * self._spread

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Predictions [n], in the objective's own unit."""
        targets = np.clip(self._model.predict(inputs) * self._spread + self._mean, *self._bounds)
        return self._sign * np.exp(targets) if self._logarithmic else targets

    def _forward(self, values: np.ndarray) -> np.ndarray:
        return np.log(self._sign * values) if self._logarithmic else np.asarray(values, dtype=float)


def _scale_of(values: np.ndarray) -> tuple[float, bool]:
    for sign in (1.0, -1.0):
        if (sign * values > 0).all() and (sign * values).max() > 10 * (sign * values).min():
            return sign, True
    return 1.0, False


def _fitted(make: Callable[[], RegressorMixin], inputs: np.ndarray, targets: np.ndarray) -> RegressorMixin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make().fit(inputs, targets)


def _cross_validated(make: Callable[[], RegressorMixin], inputs: np.ndarray, targets: np.ndarray) -> float:
    if len(inputs) < 2 * FOLDS or not np.ptp(targets):
        return 0.0
    predicted = np.empty(len(inputs))
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(inputs):
        predicted[test] = _fitted(make, inputs[train], targets[train]).predict(inputs[test])
    if not np.ptp(predicted):
        return 0.0
    return float(kendalltau(predicted, targets).statistic)
