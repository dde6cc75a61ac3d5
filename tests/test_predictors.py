"""What the predictors learn from few evaluations, and what they must not make up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from jointopt import Gene, Objective, SearchSpace
from jointopt.objectives import Constraint
from jointopt.predictors import Choices, Predictor, robust, scales
from jointopt.strategies.guided_search import GuidedSearch

FORMATS = ("W4A16", "W8A8", "none")


def layered_space(blocks: int) -> SearchSpace:
    genes = []
    for block in range(blocks):
        needs = {f"block{block}.keep": (True,)}
        genes.append(Gene(f"block{block}.keep", (False, True)))
        genes += [Gene(f"block{block}.{layer}", FORMATS, needs) for layer in ("attention", "mlp")]
    return SearchSpace(genes)


SPACE = layered_space(8)
LARGE = layered_space(30)


def size_in(space: SearchSpace):
    return lambda genomes: ((genomes + 1.0) * space.active(genomes)).sum(1)


def factor_of(space: SearchSpace, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 0.3, len(space))


def additive(space: SearchSpace, seed: int = 0):
    """A loss by choice, the same for a format in every block but for a factor."""
    factor = factor_of(space, seed)
    by_choice = np.array([0.0, -1.0, -1.2])
    return lambda genomes: (factor * by_choice[genomes] * space.active(genomes)).sum(1)


def choices_of(space: SearchSpace) -> Choices:
    return Choices(space, (Objective("loss", "min"), Objective("size", "min", compute=size_in(space))))


def test_genes_of_hundreds_of_choices_are_told_apart():
    space = SearchSpace([Gene("a", tuple(range(150))), Gene("b", tuple("wxyz"))])
    groups = Choices(space, [Objective("loss", "min")]).groups
    assert groups["kind"].shape == groups["alike"].shape == (154, 154)


def test_a_sum_over_genes_is_learned():
    known, unseen = SPACE.sample(150, 0), SPACE.sample(300, 1)
    predictor = Predictor(choices_of(SPACE), known, additive(SPACE)(known))
    np.testing.assert_allclose(predictor(unseen), additive(SPACE)(unseen), atol=0.1)


def test_thirty_evaluations_rank_genomes_of_ninety_genes():
    known, unseen = LARGE.sample(30, 0), LARGE.sample(300, 1)
    predictor = Predictor(choices_of(LARGE), known, additive(LARGE)(known))
    assert spearmanr(predictor(unseen), additive(LARGE)(unseen)).statistic > 0.85


def test_an_accuracy_that_is_a_product_is_learned_on_a_logarithmic_scale():
    def product(genomes: np.ndarray) -> np.ndarray:
        return -np.exp(-0.7 * (additive(SPACE)(genomes) + 20))

    known, unseen = SPACE.sample(60, 0), SPACE.sample(200, 1)
    predictor = Predictor(choices_of(SPACE), known, product(known))
    plain = Predictor(choices_of(SPACE), known, product(known), transforms=False)
    assert predictor.scale.name == "log below 0"
    off, off_plain = (np.abs(each(unseen) / product(unseen) - 1).mean() for each in (predictor, plain))
    assert off < 0.5 * off_plain


def test_what_explodes_is_learned_on_a_logarithmic_scale():
    def explosive(genomes: np.ndarray) -> np.ndarray:
        return 5 * np.exp(0.7 * (additive(SPACE)(genomes) + 20))

    known, unseen = SPACE.sample(100, 0), SPACE.sample(200, 1)
    predictor = Predictor(choices_of(SPACE), known, explosive(known))
    assert predictor.scale.name.startswith("log")
    assert spearmanr(predictor(unseen), explosive(unseen)).statistic > 0.99


@pytest.mark.parametrize("wrong", [30.0, -30.0])
def test_a_value_that_no_other_bears_out_is_not_believed(wrong):
    known, unseen = SPACE.sample(60, 0), SPACE.sample(200, 1)
    truth = additive(SPACE)
    observed = truth(known) + np.random.default_rng(0).normal(0, 0.05, 60)
    observed[[7, 23, 41]] += wrong * np.ptp(truth(known))
    predictor, believed = robust(choices_of(SPACE), known, observed)
    plain = Predictor(choices_of(SPACE), known, observed)
    assert not believed[[7, 23, 41]].any() and believed.sum() >= 54
    errors = [np.abs(each(unseen) - truth(unseen)).mean() for each in (predictor, plain)]
    assert errors[0] < 0.2 * errors[1]


def test_what_is_picked_by_has_what_is_foreseen_in_place_of_a_value_that_no_other_bears_out():
    known = SPACE.sample(60, 0)
    right = np.stack([additive(SPACE)(known), size_in(SPACE)(known)], axis=1)
    wrong = right.copy()
    wrong[7, 0] -= 30 * np.ptp(right[:, 0])
    search = GuidedSearch(SPACE, (Objective("loss", "min"), Objective("size", "min", compute=size_in(SPACE))))
    np.testing.assert_allclose(search.believed(known, wrong).costs, right, atol=0.1 * np.ptp(right[:, 0]))


def test_what_is_believed_to_exceed_a_measured_constraint_is_not_picked_for_its_size():
    known, found = SPACE.sample(60, 0), SPACE.sample(500, 1)
    losses = additive(SPACE)
    limit = float(np.quantile(losses(known), 0.3))
    objectives = (Objective("loss", "min"), Objective("size", "min", compute=size_in(SPACE)))
    kept = []
    for constraints in ((), (Constraint("loss", limit, "<="),)):
        search = GuidedSearch(SPACE, objectives, constraints=constraints)
        beliefs = search.believed(known, np.stack([losses(known), size_in(SPACE)(known)], axis=1))
        kept.append(np.mean(losses(found[beliefs.picked(found, 10)]) <= limit + 0.1))
    assert kept[0] < 0.7 and kept[1] > 0.9


def test_what_fits_together_is_believed_and_of_few_values_all():
    few, many = SPACE.sample(9, 0), SPACE.sample(60, 0)
    outlying = additive(SPACE)(few)
    outlying[4] *= 1000
    assert robust(choices_of(SPACE), few, outlying)[1].all()
    assert robust(choices_of(SPACE), many, additive(SPACE)(many))[1].all()


def test_a_prior_that_is_right_is_believed_and_one_that_is_not_is_not():
    known, unseen = LARGE.sample(12, 0), LARGE.sample(300, 1)
    choices, random = choices_of(LARGE), np.random.default_rng(0)
    truth = additive(LARGE)
    ranks = {}
    for name, estimate in {
        "none": None,
        "right": np.array([np.eye(3)[c] @ [0, -1, -1.2] for c in choices.choice]) * factor_of(LARGE)[choices.gene],
        "useless": random.normal(size=len(choices.gene)),
    }.items():
        prior = None if estimate is None else choices.prior(estimate)
        predictor = Predictor(choices, known, truth(known), prior=prior)
        ranks[name] = spearmanr(predictor(unseen), truth(unseen)).statistic
    assert ranks["right"] > 0.98 > ranks["none"]
    assert ranks["useless"] > ranks["none"] - 0.05


def test_a_constant_is_predicted_as_itself():
    predictor = Predictor(choices_of(SPACE), SPACE.sample(20, 0), np.full(20, 3.5))
    np.testing.assert_allclose(predictor(SPACE.sample(50, 1)), 3.5, rtol=1e-3)


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_genes_that_cannot_matter_change_no_prediction(seed):
    genomes = np.random.default_rng(seed).integers(0, SPACE.sizes, (20, len(SPACE)))
    found, expected = PREDICTOR(genomes), PREDICTOR(SPACE.canonical(genomes))
    np.testing.assert_array_equal(found, expected)


PREDICTOR = Predictor(choices_of(SPACE), SPACE.sample(40, 0), additive(SPACE)(SPACE.sample(40, 0)))


def test_sums_of_a_table_are_the_encoded_genomes_times_it():
    choices, genomes = choices_of(SPACE), SPACE.sample(50, 3)
    table = np.random.default_rng(0).normal(size=(len(choices.gene), 4))
    np.testing.assert_allclose(choices.sums(genomes, table), choices.encoded(genomes) @ table, atol=1e-12)


def test_the_costs_of_choices_add_up_to_an_additive_objective():
    choices, genomes = choices_of(SPACE), SPACE.sample(200, 4)
    summed, exact = choices.sums(genomes, choices.costs[:, 0]), size_in(SPACE)(genomes)
    assert np.corrcoef(summed, exact)[0, 1] == pytest.approx(1, abs=1e-4)


def test_draws_spread_as_the_posterior_does():
    """Against the Gaussian process in its dual form: mean and covariance of unseen genomes' values."""
    unseen = SPACE.sample(6, 9)
    tables, constants = PREDICTOR.draw(6000, 1.0, np.random.default_rng(0))
    drawn = PREDICTOR.choices.sums(unseen, tables) + constants

    known = SPACE.sample(40, 0)
    features = [PREDICTOR.choices.encoded(np.vstack([known, unseen])) @ m for m in PREDICTOR.choices.groups.values()]
    covariance = np.zeros((46, 46))
    for each, weight in zip(features, PREDICTOR.weights.values(), strict=True):
        centered = (each - each[:40].mean(0)) / np.sqrt(each[:40].var(0).sum())
        covariance += weight * centered @ centered.T
    among, across = covariance[:40, :40] + np.diag(PREDICTOR.noise + 1e-8), covariance[40:, :40]
    targets = PREDICTOR.scale.forward(additive(SPACE)(known))
    standard = (targets - targets.mean()) / targets.std()
    np.testing.assert_allclose(drawn.mean(1), across @ np.linalg.solve(among, standard), atol=0.02)
    expected = covariance[40:, 40:] - across @ np.linalg.solve(among, across.T)
    np.testing.assert_allclose(np.cov(drawn), expected, atol=0.1 * np.abs(expected).max())


def test_boldness_none_draws_the_mean():
    tables, constants = PREDICTOR.draw(3, 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(tables, np.repeat(PREDICTOR.table[:, None], 3, axis=1))
    assert np.ptp(constants) == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=30))
def test_scales_give_back_the_values_they_took(values):
    costs = np.array(values)
    for scale in scales(costs):
        span = np.abs(costs).max() + 1
        np.testing.assert_allclose(scale.inverse(scale.forward(costs)), costs, rtol=1e-6, atol=1e-9 * span)


def test_a_space_without_exact_objectives_and_one_with_a_constant_one():
    known = SPACE.sample(60, 0)
    for objectives in ((), (Objective("size", "min", compute=lambda genomes: np.ones(len(genomes))),)):
        predictor = Predictor(Choices(SPACE, objectives), known, additive(SPACE)(known))
        unseen = SPACE.sample(100, 1)
        assert spearmanr(predictor(unseen), additive(SPACE)(unseen)).statistic > 0.95
