"""What ends a search, what it keeps to, and what its progress shows."""

from __future__ import annotations

import signal
import sys
import time

import numpy as np
import pytest
import torch

import jointopt
from jointopt import Gene, JointoptError, Objective, SearchSpace, Study, Supernet
from jointopt.loop.loop import _Run
from jointopt.loop.stopping import Budget, Watch, expected_gain, heeding_ctrl_c
from jointopt.objectives import hypervolume
from tests.zoo import batches, logits, make, supernet_of

DATA = batches("vit", seed=5)[0]
TARGET = logits(make("vit"), DATA)


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return supernet_of("vit", ["none", "W8A8", "W4A16"])


def agreement(model: torch.nn.Module) -> float:
    return -float((logits(model, DATA) - TARGET).square().mean())


def test_time_ends_a_search_and_more_time_goes_on(supernet, tmp_path):
    def slow(model: torch.nn.Module) -> float:
        time.sleep(0.2)
        return agreement(model)

    counts = []
    for minutes in (0.02, 0.02, 0.06):
        study = jointopt.search(supernet, slow, minutes=minutes, strategy="random", storage=tmp_path / "s.db")
        assert study.stopped == f"minutes: {minutes} are over"
        counts.append(len(study))
        study.close()
    assert 1 <= counts[0] == counts[1] < counts[2] < 30


def test_a_search_without_gain_ends_at_the_end_of_a_batch(supernet, tmp_path):
    def same(model: torch.nn.Module) -> float:
        return 1.0

    study = jointopt.search(supernet, same, ["quality"], patience=15, storage=tmp_path / "s.db")
    assert len(study) == 20 and study.stopped == "patience: no hypervolume gained in the last 19 evaluations"
    study.close()
    assert len(jointopt.search(supernet, same, ["quality"], patience=25, storage=tmp_path / "s.db")) == 30


def test_patience_counts_gains_in_batches_of_one(supernet):
    quality = iter(np.linspace(0, 1, 100))
    study = jointopt.search(supernet, lambda model: next(quality), ["quality"], evaluations=30, patience=15, batch=1)
    assert len(study) == 30 and study.stopped.startswith("evaluations")
    assert (np.diff(study.hypervolume_history())[10:] > 0).all()


def test_a_space_smaller_than_the_budget_is_finished_and_said():
    model = make("vit")
    space = SearchSpace([Gene("block0.mlp", (64, 128, 256)), Gene("block1.mlp", (128, 256))])
    found = Supernet(model, space)
    found.calibrate(batches("vit"))
    with pytest.warns(UserWarning, match="found 200, but the space has 6 genomes"):
        study = jointopt.search(found, agreement)
    assert len(study) == 6 and study.stopped == "space: all 6 genomes that can be asked for are evaluated"
    study = jointopt.search(
        found, agreement, constraints={"macs": f"<= {study.evaluations()['macs'].median()}"}, evaluations=6
    )
    assert 1 <= len(study) < 6


def test_bad_budgets_are_refused(supernet):
    for given, said in (
        ({"evaluations": 2.5}, "evaluations: found 2.5"),
        ({"minutes": 0}, "minutes: found 0"),
        ({"minutes": float("nan")}, "minutes: found nan"),
        ({"minutes": 1e14}, "minutes: found 100000000000000.0; allowed: above 0, up to 10000000"),
        ({"patience": True}, "patience: found True"),
        ({"batch": 0}, "batch: found 0"),
        ({"batch": 10**7}, "batch: found 10000000; allowed: a whole number from 1 to 1000000"),
        ({"threads": 10**5}, "threads: found 100000; allowed: a whole number from 1 to 1024"),
    ):
        with pytest.raises(JointoptError, match=said):
            jointopt.search(supernet, agreement, **given)
    assert Budget().evaluations == 200 and Budget(minutes=1).evaluations is None


def test_constraints_are_kept_and_the_front_stays_whole(supernet, tmp_path):
    low, high = (supernet.costs(g)["size"] / 1e6 for g in (supernet.space.smallest, supernet.space.largest))
    limit = round((low + high) / 2, 3)
    constraints = {"size_mb": f"<= {limit}", "quality": ">= -1000"}
    study = jointopt.search(supernet, agreement, evaluations=20, constraints=constraints, storage=tmp_path / "s.db")
    assert (study.evaluations()["size"] <= limit * 1e6).all()
    assert [str(each) for each in study.constraints] == [f"size_mb <= {limit:g}", "quality >= -1000"]
    study.close()
    with pytest.raises(JointoptError, match="constraints.size_mb was"):
        jointopt.search(supernet, agreement, evaluations=20, storage=tmp_path / "s.db")
    loose = jointopt.search(supernet, agreement, evaluations=20)
    median = loose.evaluations()["quality"].median()
    picked = jointopt.search(supernet, agreement, evaluations=20, constraints={"quality": f">= {median}"})
    genome = picked.best(size_mb=high)
    assert picked.results(genome[None])[0]["quality"] >= median
    assert tuple(picked.best(knee=True)) in set(picked.evaluations().query("quality >= @median")["genome"])
    hopeless = jointopt.search(supernet, agreement, evaluations=10, constraints={"quality": ">= 1"})
    assert len(hopeless.front()) > 0
    with pytest.raises(JointoptError, match="constraints: no evaluation has quality >= 1; the closest has"):
        hopeless.best()


def test_what_no_genome_can_meet_is_refused_before_any_evaluation(supernet):
    def never(model: torch.nn.Module) -> float:
        raise AssertionError("evaluated")

    for constraints, said in (
        ({"size_mb": "<= 0.001"}, "size_mb <= 0.001: no genome meets it"),
        ({"size_mb": "20"}, "found '20'"),
        ({"latency": "<= 1"}, "found 'latency'; allowed: size_mb, "),
        (["size_mb"], "found \\['size_mb'\\]"),
    ):
        with pytest.raises(JointoptError, match=said):
            jointopt.search(supernet, never, evaluations=5, constraints=constraints)


SPACE = SearchSpace([Gene("a", (1, 2, 3)), Gene("b", (1, 2))])


def small_study() -> Study:
    objectives = [Objective("accuracy", "max"), Objective("size", "min")]
    study = Study.create(None, SPACE, objectives, {})
    genomes = np.array([[0, 0], [2, 1]])
    study.add_generation(genomes, np.full((2, 2), np.nan), {})
    for genome, accuracy, size in zip(genomes, (0.0, 1.0), (0.0, 1.0), strict=True):
        study.add_evaluation(0, genome, {"accuracy": accuracy, "size": size}, None, 0.1, elapsed=30.0)
    return study


def study_of(values: list[tuple[float, float]]) -> Study:
    """Over perplexity and size, one evaluation a pair."""
    space = SearchSpace([Gene("a", tuple(range(100)))])
    study = Study.create(None, space, [Objective("perplexity", "min"), Objective("size", "min")], {})
    for at, (perplexity, size) in enumerate(values):
        study.add_evaluation(0, np.array([at]), {"perplexity": perplexity, "size": size}, None, 0.1)
    return study


def test_what_explodes_among_the_first_is_not_what_hypervolume_is_measured_from():
    usual = [(20.0, 100), (21.0, 90), (25.0, 80), (30.0, 70)]
    exploded = study_of([*usual, (1e18, 10), (1e6, 20)])
    assert exploded.reference_point() == study_of(usual).reference_point()
    assert exploded.hypervolume_history()[-1] == exploded.hypervolume_history()[3] > 0


def test_hypervolume_is_measured_from_a_tenth_beyond_the_worst_of_the_first_ten_and_of_the_original():
    study = study_of([(20.0, 100), (30.0, 60), *[(25.0, 80)] * 8, (90.0, 900)])
    assert study.reference_point() == [31.0, 104.0]
    study.note("baselines", {"original": {"perplexity": 40.0, "size": 110}})
    assert study.reference_point() == [42.0, 115.0]
    study = Study.create(None, study.space, [Objective("accuracy", "max"), Objective("size", "min")], {})
    for at, (accuracy, size) in enumerate([(0.5, 7), (0.9, 7)]):
        study.add_evaluation(0, np.array([at]), {"accuracy": accuracy, "size": size}, None, 0.1)
    assert study.reference_point() == pytest.approx([0.46, 7.7])  # where all are alike, a tenth of what they are


def test_the_hypervolume_after_each_evaluation_is_that_of_all_up_to_it():
    drawn = np.random.default_rng(0).integers(0, 12, (60, 2)) + 0.5  # some equal in one objective, or in both
    study = study_of([(float("nan"), 1.0), *map(tuple, drawn.tolist())])
    whole = [hypervolume(study.costs()[: at + 1], study.reference_point()) for at in range(61)]
    np.testing.assert_allclose(study.hypervolume_history(), whole)
    assert 3 < len(set(whole)) < 40


def test_any_evaluation_that_enters_the_front_within_the_reference_is_a_gain():
    study = study_of([(20.0, 1e9), (21.0, 1.0), (20.0 - 1e-13, 1e9), (30.0, 1e9)])
    spent = Budget(patience=1).spent(study, 0.0)
    assert spent == "patience: no hypervolume gained in the last 1 evaluations"


def test_the_expected_gain_is_what_the_predictions_would_add():
    study = small_study()
    assert expected_gain(study, np.full((1, 2), np.nan)) is None
    assert expected_gain(study, np.array([[0.5, 0.9]])) == pytest.approx(
        0.6 * 0.2 / 0.21 - 0.02 / 0.21 - 0.1 / 0.21, abs=1
    )
    assert expected_gain(study, np.array([[-1.0, 2.0]])) == 0
    assert expected_gain(study, np.array([[1.0, 0.0]])) > 1


def test_progress_shows_the_time_left_and_the_expected_gain():
    study = small_study()
    watch = Watch(study, Budget(evaluations=6, minutes=2), shown=True)
    assert watch.told().startswith("2/6, 0:00:30, 0:01:30 left")
    watch.asked(np.array([[1.0, 0.0]]))
    assert watch.told().endswith("% hypervolume expected")
    assert 85 < watch.seconds_left() <= 90


def test_numbers_follow_the_order_of_asking_whatever_ends_first(supernet):
    class Backwards:
        """Gives back the last first."""

        count = 4

        def __init__(self):
            self.held: list = []

        def submit(self, numbers, genomes):
            self.held += zip(numbers, genomes, strict=True)

        def collect(self, seconds):
            number, genome = self.held.pop()
            return [(number, jointopt.evaluation.evaluation.evaluate(supernet, genome, agreement))]

    objectives = [Objective("quality", "max"), Objective("size", "min")]

    def searched(evaluator) -> list:
        study = Study.create(None, supernet.space, objectives, {})
        asking = jointopt.strategies.create("guided", supernet.space, objectives, seed=1)
        budget = Budget(evaluations=23)
        reason = _Run(study, asking, evaluator, budget, Watch(study, budget, False), 10, (), lambda: None).batches()
        assert reason == "evaluations: 23 done"
        return study.evaluations().drop(columns="seconds").fillna("none").to_dict("records")

    from jointopt.evaluation.workers import Serial

    assert searched(Backwards()) == searched(Serial(supernet, agreement, 1))


def test_a_ctrl_c_that_python_drops_while_it_deletes_something_is_heeded_all_the_same():
    class Deleted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with heeding_ctrl_c() as check:
            check()
            dropped = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "unraisablehook", dropped.append)
                Deleted()
            assert dropped[0].exc_type is KeyboardInterrupt
            with pytest.raises(KeyboardInterrupt):
                check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
