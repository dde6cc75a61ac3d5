"""The strategies by ask and tell: on problems that need no model, with what users get wrong."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointopt import Gene, JointoptError, Objective, SearchSpace, strategies
from jointopt.objectives import hypervolume, minimized, non_dominated
from jointopt.strategies import guided_search
from jointopt.strategies.batches import UNSHARED, Areas, Points, Times, pick
from jointopt.strategies.beliefs import Beliefs
from jointopt.strategies.genetic import order, select
from tests.conditional_problem import SPACE, STRATEGIES, TWO, loss, macs, measure, searched, size


@pytest.mark.parametrize("name", STRATEGIES)
def test_genomes_asked_are_canonical_and_never_asked_twice(name):
    strategy = searched(name, 6)
    assert np.array_equal(SPACE.canonical(strategy.told), strategy.told)
    assert len(np.unique(strategy.told, axis=0)) == len(strategy.told) == 60


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_restored_from_json_goes_on_as_if_it_had_never_stopped(name):
    whole = searched(name, 4)
    state = json.loads(json.dumps(whole.state_dict()))
    restored = strategies.create(name, SPACE, TWO, seed=99)
    restored.load_state_dict(state)
    for _ in range(2):
        expected, found = whole.ask(7), restored.ask(7)
        assert (expected == found).all()
        np.testing.assert_array_equal(whole.predicted, restored.predicted)
        whole.tell(expected, measure(expected))
        restored.tell(found, measure(found))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    "objectives",
    [
        (Objective("loss", "min"),),
        (Objective("accuracy", "max"), Objective("size", "min", size)),
        (Objective("size", "min", size), Objective("macs", "min", macs)),
        (Objective("accuracy", "max"), Objective("size", "min", size), Objective("macs", "min", macs)),
        (Objective("accuracy", "max"), Objective("loss", "min"), *TWO[1:], Objective("macs", "min", macs)),
    ],
    ids=lambda objectives: "+".join(o.name for o in objectives),
)
def test_one_to_four_objectives(name, objectives):
    strategy = searched(name, 4, objectives)
    assert strategy.values.shape == (40, len(objectives)) and np.isfinite(strategy.values).all()
    if name != "random" and objectives[0].name == "loss":
        assert strategy.values.min() == 0


def test_guided_learns_from_the_front_and_the_latest_of_many_evaluations(monkeypatch):
    strategy = searched("guided", 6)
    front = strategy.told[non_dominated(strategy.costs())]
    monkeypatch.setattr(guided_search, "LEARNED", len(front) + 10)
    seen: list[Beliefs] = []

    def believed(*given) -> Beliefs:
        seen.append(Beliefs(*given))
        return seen[-1]

    strategy.beliefs = believed
    strategy.ask(5)
    learned = {genome.tobytes() for genome in seen[0].told}
    assert len(learned) == len(front) + 10 < len(strategy.told)
    assert {genome.tobytes() for genome in [*front, *strategy.told[-10:]]} <= learned


def test_guided_finds_more_in_40_evaluations_than_evolutionary_in_200():
    def volume(strategy) -> float:
        return hypervolume(
            minimized(strategy.values, TWO), [loss(SPACE.smallest[None])[0], size(SPACE.largest[None])[0]]
        )

    assert volume(searched("guided", 4)) > volume(searched("evolutionary", 20))


def test_batches_are_picked_to_share_first_parts_and_the_front_is_no_worse():
    space = SearchSpace([Gene(f"block{at // 5}.{at % 5}", (1, 2, 3, 4)) for at in range(40)])
    weights = np.random.default_rng(0).lognormal(0, 1, 40)
    objectives = (Objective("loss", "min"), Objective("size", "min", compute=lambda genomes: genomes.sum(1) + 0.0))

    def found(**options) -> tuple[float, float]:
        strategy = strategies.create("guided", space, objectives, seed=3, **options)
        beginnings: list[set[bytes]] = []
        for _ in range(5):
            genomes = strategy.ask(10)
            strategy.tell(genomes, np.stack([(3 - genomes) ** 1.5 @ weights, genomes.sum(1)], axis=1))
            beginnings.append({row[: 5 * depth].tobytes() for row in genomes for depth in range(1, 9)})
        run = sum(map(len, beginnings[1:])) / (4 * 10 * 8)
        return run, hypervolume(minimized(strategy.values, objectives), [3**1.5 * weights.sum(), 160])

    alone, volume = found()
    shared, as_good = found(parts=[[], *np.arange(40).reshape(8, 5).tolist()])
    assert shared < 0.7 < 0.85 < alone and as_good > 0.97 * volume


@pytest.mark.parametrize("objectives", [1, 2, 3])
@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_what_candidates_add_is_the_difference_of_hypervolumes(objectives, seed):
    """Averaged over the draws; of three objectives and more as nearly as random points tell."""
    random = np.random.default_rng(seed)
    told, candidates = random.random((6, objectives)) * 1.2, random.random((3, 8, objectives)) * 1.2
    reference, all_told = np.full(objectives, 1.05), np.stack([told] * 3)
    few = objectives < 3
    volume = Areas(all_told, candidates, reference) if few else Points(all_told, candidates, reference, random)
    added: list[int] = []
    for index in (3, 5):
        gained = [
            np.mean([hypervolume(np.vstack([told, rows[[*added, at]]]), reference) for rows in candidates])
            - np.mean([hypervolume(np.vstack([told, rows[added]]), reference) for rows in candidates])
            for at in range(8)
        ]
        if few:
            np.testing.assert_allclose(volume.gains(), gained, atol=1e-12)
        elif max(gained) > 0.02:
            assert np.corrcoef(volume.gains(), gained)[0, 1] > 0.97
        assert np.allclose(
            volume.gains()[np.array(gained) < 1e-12], 0, atol=1e-12
        )  # beyond the reference, or dominated
        volume.add(index)
        added.append(index)


def test_a_genome_takes_the_time_of_the_parts_after_those_that_it_has_in_common_with_a_picked_one():
    space = SearchSpace([Gene("depth", (2, 3)), *(Gene(f"block{at}.width", (1, 2)) for at in range(3)), LAST])
    genomes = np.array([[1, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    times = Times(space, [[0], [1], [2], [3], [4]], genomes)
    assert times.each().tolist() == [1.0] * 5
    times.add(0)
    # The last lacks block2.last, and the first part, which all others follow, is another: nothing of it is shared.
    assert times.each() == pytest.approx([1 - (1 - UNSHARED) * shared for shared in (1, 2 / 4, 1 / 4, 0, 0)])
    times.add(3)
    assert times.each() == pytest.approx([1 - (1 - UNSHARED) * shared for shared in (1, 2 / 4, 1 / 4, 1, 0)])


def test_what_adds_less_in_far_less_time_is_picked_before():
    space = SearchSpace([Gene(f"block{at}.width", (1, 2)) for at in range(3)])
    genomes = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1]])
    told, reference = np.ones((1, 1, 1)), np.ones(1)
    candidates = np.array([[[0.5], [0.4], [0.38]]])
    parts = [[], [0], [1], [2]]
    alone = pick(Areas(told, candidates, reference), np.zeros(3), None, 3)
    assert alone[0] == 2
    candidates = np.array([[[0.3], [0.2], [0.1]]])  # the third adds twice what the second does, and takes three times
    volume = Areas(told, candidates, reference)
    times = Times(space, parts, genomes)
    volume.add(0), times.add(0)
    assert pick(volume, np.zeros(3), times, 1) == [1]
    assert pick(Areas(told, candidates, reference), np.array([0.0, 0.0, 0.2]), None, 1) == [1]  # what counts against it


def test_none_is_picked_twice_though_nothing_adds_anything():
    told, reference = np.zeros((1, 1, 2)), np.ones(2)
    volume = Areas(told, np.full((1, 4, 2), 0.5), reference)
    assert sorted(pick(volume, np.zeros(4), None, 4)) == [0, 1, 2, 3]


def test_computed_costs_are_compared_by_ratio():
    space = SearchSpace([Gene(f"block{at}.width", (1, 2, 4)) for at in range(24)])
    weights = np.random.default_rng(0).lognormal(0, 1, 24)

    def bytes_of(genomes: np.ndarray) -> np.ndarray:
        return np.exp(genomes.sum(1) * np.log(100) / 48)

    strategy = strategies.create(
        "guided", space, (Objective("loss", "min"), Objective("size", "min", bytes_of)), seed=3
    )
    for _ in range(5):
        genomes = strategy.ask(10)
        strategy.tell(genomes, np.stack([(2 - genomes) @ weights, bytes_of(genomes)], axis=1))
    assert 0.3 < np.mean(strategy.values[10:, 1] < 10) < 0.7


def test_every_uniform_number_format_is_among_the_first_that_are_tried():
    bits = {"none": 32, "W8A8": 8, "W4A16": 4, "FP8": 8, "NVFP4": 4.5}
    blocks = [f"block{at}" for at in range(6)]
    widths = [Gene(f"{block}.width", (1, 2, 4)) for block in blocks]
    formats = [Gene(f"{block}.{layer}", tuple(bits)) for block in blocks for layer in ("in", "out")]
    space = SearchSpace([Gene("heads", (1, 2)), *widths, *formats])
    stored = np.array([*bits.values()])

    def bytes_of(genomes: np.ndarray) -> np.ndarray:
        return (np.repeat(2.0 ** genomes[:, 1:7], 2, axis=1) * stored[genomes[:, 7:]]).sum(1)

    strategy = strategies.create(
        "guided", space, (Objective("loss", "min"), Objective("size", "min", bytes_of)), seed=0
    )
    whole = [genome for genome in strategy.ask(10) if (genome[:7] == space.largest[:7]).all()]
    assert {(0,), (1,), (2,), (3,), (4,)} <= {tuple(set(genome[7:].tolist())) for genome in whole}


def test_genes_of_the_same_numbers_but_another_kind_are_tried_apart():
    blocks = [f"block{at}" for at in range(4)]
    space = SearchSpace([Gene("depth", (2, 3, 4)), *(Gene(f"{block}.heads", (2, 3, 4)) for block in blocks)])
    strategy = strategies.create("guided", space, (Objective("loss", "min"),), seed=0)
    first = {tuple(genome.tolist()) for genome in strategy.ask(10)}
    assert {(1, 2, 2, 2, 2), (2, 1, 1, 1, 1)} <= first


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("parts", [[], [[], [0, 2], [1]]])
def test_a_space_smaller_than_the_budget_is_finished(count, parts):
    space = SearchSpace([Gene("a", (1, 2)), Gene("b", (1, 2, 3)), Gene("c", (1, 2), {"a": (2,)})])
    objectives = tuple(Objective(name, "min") for name in "xyz"[:count])
    strategy = strategies.create("guided", space, objectives, initial=5, parts=parts)
    asked = []
    while len(genomes := strategy.ask(4)):
        asked += genomes.tolist()
        strategy.tell(genomes, np.stack([genomes.sum(1), -genomes[:, 0], genomes[:, 1] % 2], axis=1)[:, :count])
    assert len(asked) == space.count() == 9


@pytest.mark.parametrize("values", ["constant", "infinite", "failed", "huge", "explosive"])
def test_odd_values_do_not_stop_the_search(values):
    strategy = strategies.create("guided", SPACE, TWO, seed=0)
    random = np.random.default_rng(0)
    for _ in range(4):
        genomes = strategy.ask(10)
        told = measure(genomes)
        told[:, 0] = {
            "constant": np.full(10, 0.5),
            "infinite": np.where(random.random(10) < 0.5, np.inf, told[:, 0]),
            "failed": np.full(10, np.nan),
            "huge": 1e300 * told[:, 0],
            "explosive": np.exp(20 * told[:, 0]),
        }[values]
        strategy.tell(genomes, told)
    assert len(np.unique(strategy.told, axis=0)) == 40


def test_what_fails_is_avoided():
    strategy = strategies.create("guided", SPACE, TWO, seed=0)
    failures = []
    for _ in range(7):
        genomes = strategy.ask(10)
        told = measure(genomes)
        failed = genomes[:, 1] == 2
        told[failed, 0] = np.nan
        failures.append(failed.sum())
        strategy.tell(genomes, told)
    assert sum(failures[-4:]) <= 2 < failures[0]


def test_genomes_never_asked_for_may_be_told_and_are_not_asked():
    strategy = strategies.create("guided", SPACE, TWO, seed=0)
    own = SPACE.sample(30, seed=5)
    strategy.tell(own, measure(own))
    asked = strategy.ask(10)
    assert not {genome.tobytes() for genome in own} & {genome.tobytes() for genome in asked}
    assert np.isfinite(strategy.predicted).all(), "30 evaluations are enough to predict from"


@pytest.mark.parametrize(
    ("genomes", "values", "message"),
    [
        (SPACE.sample(3, 0), np.zeros((3, 1)), r"tell: found values of shape \(3, 1\); allowed: \(3, 2\)"),
        (SPACE.sample(3, 0), np.zeros((2, 2)), r"tell: found values of shape \(2, 2\); allowed: \(3, 2\)"),
        (SPACE.sample(2, 0), [["a", "b"], ["c", "d"]], "found values that are no numbers"),
        (np.zeros((2, 5), dtype=int), np.zeros((2, 2)), r"genome: found shape \(2, 5\)"),
        (np.full((1, 12), 7), np.zeros((1, 2)), "gene 'block0.keep' has index 7; allowed: 0 to 1"),
        (np.zeros((1, 12)), np.zeros((1, 2)), "found numbers of type float64; allowed: integers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(genomes, values, message):
    strategy = searched("guided", 1)
    before = json.dumps(strategy.state_dict())
    with pytest.raises(JointoptError, match=message) as raised:
        strategy.tell(genomes, values)
    assert "\n" not in str(raised.value)
    assert json.dumps(strategy.state_dict()) == before


def test_an_exact_objective_of_the_wrong_shape_is_named():
    wrong = Objective("size", "min", compute=lambda genomes: genomes)
    with pytest.raises(JointoptError, match=r"objective 'size': compute gave shape \(\d+, 12\); allowed"):
        strategies.create("guided", SPACE, (Objective("loss", "min"), wrong))


@pytest.mark.parametrize("n", [0, -1, 2.0, "3", None, True])
def test_asking_for_no_number_of_genomes_is_refused(n):
    with pytest.raises(JointoptError, match=f"ask: found {n!r}; allowed: a whole number from 1"):
        strategies.create("random", SPACE, TWO).ask(n)


@pytest.mark.parametrize(
    ("objectives", "options", "said"),
    [
        (["loss"], {}, "objectives: found 'loss'; allowed: jointopt.Objective"),
        (TWO, {"constraints": {"size": "<= 3"}}, "constraints: found 'size'; allowed: jointopt.Constraint"),
        (TWO, {"prior": 3}, "prior: found 3; allowed: measured objective -> an array for each gene"),
    ],
)
def test_arguments_of_another_kind_are_named(objectives, options, said):
    with pytest.raises(JointoptError, match=re.escape(said)):
        strategies.create("guided", SPACE, objectives, **options)


def test_a_studys_own_columns_are_no_names_of_objectives():
    with pytest.raises(JointoptError, match="objective 'seconds': every study has a column of this name"):
        Objective("seconds", "min")


def test_a_genome_told_again_replaces_its_earlier_row():
    strategy = searched("guided", 2)
    again, before = strategy.told[[3, 17]], len(strategy.told)
    strategy.tell(again, np.array([[7.0, 8.0], [9.0, 10.0]]))
    assert len(strategy.told) == before
    np.testing.assert_array_equal(strategy.values[[3, 17]], [[7, 8], [9, 10]])


LAST = Gene("block2.last", (1, 2), {"depth": (3,)})
EFFECTS = [np.arange(size) for size in SPACE.sizes]
LARGE = SearchSpace([Gene(f"block{at // 4}.layer{at % 4}", ("W4A16", "W8A8", "none")) for at in range(60)])


def test_a_good_prior_helps_from_the_start_and_a_useless_one_costs_little():
    random = np.random.default_rng(0)
    losses = random.lognormal(0, 1, (60, 1)) * np.array([1.0, 0.2, 0.0])
    columns = np.arange(60)
    bits = Objective("size", "min", lambda genomes: np.array([4.0, 8.0, 16.0])[genomes].sum(1))
    priors = {
        "none": {},
        "good": {"loss": losses * random.lognormal(0, 0.5, losses.shape)},
        "useless": {"loss": random.permuted(losses, axis=None).reshape(losses.shape)},
    }
    found = {}
    for name, prior in priors.items():
        strategy = strategies.create("guided", LARGE, (Objective("loss", "min"), bits), seed=0, prior=prior)
        for _ in range(5):
            genomes = strategy.ask(8)
            strategy.tell(genomes, np.stack([losses[columns, genomes].sum(1), bits.compute(genomes)], axis=1))
        costs = strategy.values / [losses.max(1).sum(), 960]
        found[name] = [hypervolume(costs[:count], [1.0, 1.0]) for count in (16, 40)]
    assert found["good"][0] > found["none"][0] + 0.03 and found["good"][1] > found["none"][1] + 0.01
    assert found["useless"][1] > 0.95 * found["none"][1]


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"size": EFFECTS}, "prior: found 'size'; allowed: measured objectives: loss"),
        ({"loss": EFFECTS[:-1]}, "prior of 'loss': found 11 arrays; allowed: one a gene, 12"),
        ({"loss": [*EFFECTS[:-1], np.zeros(2)]}, r"gene 'block3.format' has shape \(2,\); allowed: \(3,\), finite"),
        ({"loss": [*EFFECTS[:-1], np.full(3, np.nan)]}, "gene 'block3.format' .* finite"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(prior, message):
    with pytest.raises(JointoptError, match=message):
        strategies.create("guided", SPACE, TWO, prior=prior)


@pytest.mark.parametrize("name", STRATEGIES)
def test_contradictory_objectives_are_all_front(name):
    contrary = (Objective("loss", "min"), Objective("size", "max", compute=size), Objective("size ", "min", size))
    strategy = strategies.create(name, SPACE, contrary)
    for _ in range(3):
        genomes = strategy.ask(10)
        strategy.tell(genomes, np.stack([loss(genomes), size(genomes), size(genomes)], axis=1))
    assert len(np.unique(strategy.told, axis=0)) == 30


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_ranking_by_arrays_keeps_what_deap_selects(seed, n, objectives):
    """But for the ends of a front, which are all equally far from the crowd."""
    costs = np.random.default_rng(seed).random((n, objectives))
    place = order(costs)
    fronts, left = np.empty(n, dtype=int), np.arange(n)
    for number in range(n):
        first = non_dominated(costs[left])
        fronts[left[first]] = number
        left = left[~first]
    assert (np.diff(fronts[np.argsort(place)]) >= 0).all()
    for k in {1, n // 3, n // 2, n - 1} - {0}:
        found, expected = np.argsort(place)[:k], select(costs, k)
        inner = [set(kept) - ends(costs, fronts) for kept in (found, expected)]
        assert sorted(fronts[found]) == sorted(fronts[expected])
        assert inner[0] == inner[1] or ends(costs, fronts) & (set(found) ^ set(expected))


def ends(costs: np.ndarray, fronts: np.ndarray) -> set[int]:
    """Rows that are the least or the greatest of their front in some objective."""
    found: set[int] = set()
    for number in np.unique(fronts):
        members = np.flatnonzero(fronts == number)
        for column in costs[members].T:
            found |= {int(members[column.argmin()]), int(members[column.argmax()])}
    return found


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 2), min_size=1, max_size=40))
def test_non_dominated_rows_are_those_that_no_other_beats(rows):
    costs = np.array(rows, dtype=float)
    kept = non_dominated(costs)
    for at, row in enumerate(costs):
        beaten = ((costs <= row).all(1) & (costs < row).any(1)).any()
        repeated = (costs[:at] == row).all(1).any()
        assert kept[at] == (not beaten and not repeated)
