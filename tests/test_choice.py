"""What a study chooses by what is wished for: a limit, a tolerated drop, the knee; and the front that it is on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import jointopt
from jointopt import Gene, JointoptError, Objective, SearchSpace, Study, Supernet
from jointopt.study.choice import best_of
from tests.test_search import agreement
from tests.zoo import supernet_of


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return supernet_of("vit", ["none", "W8A8", "W4A16"])


def test_best_by_drop_and_knee_and_nothing(supernet):
    study = jointopt.search(supernet, agreement, evaluations=30)
    frame = study.evaluations()
    assert study.results(study.best()[None])[0]["quality"] == frame["quality"].max()
    tolerated = frame["quality"].median()
    chosen = study.results(study.best(drop=-tolerated)[None])[0]
    assert chosen["size"] == frame[frame["quality"] >= tolerated - 1e-12]["size"].min()
    assert tuple(study.best(knee=True)) in set(study.front()["genome"])
    with pytest.raises(JointoptError, match="smallest evaluated has"):
        study.best(size_mb=1e-6)
    for wish in ("20", True, float("inf")):
        with pytest.raises(JointoptError, match=f"best: found size_mb={wish!r}; allowed: a number"):
            study.best(size_mb=wish)
    with pytest.raises(JointoptError, match="more than one"):
        study.best(size_mb=1, knee=True)


def test_the_knee_looks_at_every_objective():
    objectives = [Objective("loss", "min"), Objective("size", "min"), Objective("latency", "min")]
    study = Study.create(None, SearchSpace([Gene("depth", tuple(range(1, 6)))]), objectives, {})
    values = [(0, 10, 1), (10, 0, 1), (1, 1, 10), (3, 3, 0)]
    for at, each in enumerate(values):
        study.add_evaluation(0, np.array([at]), dict(zip(("loss", "size", "latency"), each, strict=True)), None, 1.0)
    assert study.best(knee=True).tolist() == [3]


TWO = (Objective("accuracy", "max"), Objective("macs", "min"))


def chosen_among(rows: list[tuple], objectives: Sequence[Objective] = TWO, **wish: float) -> tuple[list[int], Study]:
    """Of a study over two objectives alone, beside which size is known; the original has an accuracy of 1."""
    study = Study.create(None, SearchSpace([Gene("depth", tuple(range(1, 6)))]), objectives, {})
    study.note("baselines", {"original": {"accuracy": 1.0}})
    names = ("accuracy", objectives[-1].name, "size")
    for at, row in enumerate(rows):
        metrics = dict(zip(names, row, strict=True))
        study.add_evaluation(0, np.array([at]), metrics, None, 1.0)
    return study.best(**wish).tolist(), study


@pytest.mark.parametrize("wish", [{}, {"size_mb": 1}])
def test_of_equal_quality_the_better_in_the_study_s_own_objectives_is_chosen(wish):
    assert chosen_among([(1.0, 20, 100), (1.0, 10, 200), (0.5, 5, 50)], **wish)[0] == [1]


@given(size=st.integers(1, 10**12))
@example(size=524_287)  # 0.524287 * 1e6 is less
def test_a_sub_network_has_the_size_that_is_said_of_it(size):
    frame = pd.DataFrame([{"number": 0, "genome": (1,), "accuracy": 1.0, "size": size}])
    assert best_of(frame, TWO, TWO[0], None, size_mb=size / 1e6).tolist() == [1]


def test_a_tolerated_drop_gives_the_least_of_the_study_s_first_cost():
    assert chosen_among([(1.0, 20, 100), (0.9, 10, 200), (0.9, 30, 50), (0.1, 1, 1)], drop=0.2)[0] == [1]


def test_a_tolerated_drop_gives_the_best_of_another_measured_objective_where_there_is_no_cost():
    objectives = [Objective("accuracy", "max"), Objective("robustness", "max")]
    rows = [(1.0, 0.1, 100), (0.9, 0.5, 300), (0.85, 0.4, 50), (0.1, 0.9, 1)]
    chosen, study = chosen_among(rows, objectives, drop=0.2)
    assert chosen == [1] and (1,) in set(study.front()["genome"])


def test_a_drop_of_the_one_objective_is_refused():
    with pytest.raises(JointoptError, match="drop: found 0.2, and accuracy is the study's one objective"):
        chosen_among([(1.0, 20, 100), (0.9, 10, 20)], [Objective("accuracy", "max")], drop=0.2)


def test_of_equals_in_all_objectives_the_smaller_is_on_the_front_and_chosen():
    chosen, study = chosen_among([(1.0, 10, 200), (1.0, 10, 100)])
    assert chosen == [1] and study.front()["genome"].tolist() == [(1,)]


def test_hypervolume_is_measured_where_the_first_evaluations_all_failed(supernet):
    calls = iter(range(100))

    def quality(model: torch.nn.Module) -> float:
        if 0 < next(calls) <= 11:
            raise ValueError("not yet")
        return agreement(model)

    study = jointopt.search(supernet, quality, evaluations=14, batch=14, strategy="random")
    assert study.evaluations()["failed"].notna().sum() == 11 and study.reference_point() is not None
