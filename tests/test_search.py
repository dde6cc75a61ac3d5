"""The search on a real super-network: recorded, resumable, and not to be stopped by a user's mistake."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import jointopt
from jointopt import Gene, JointoptError, Objective, SearchSpace, Study, Supernet, strategies
from jointopt.strategies.strategy import Strategy
from tests.zoo import batches, logits, make, supernet_of


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return supernet_of("vit", ["none", "W8A8", "W4A16"])


DATA = batches("vit", seed=5)
TARGET = logits(make("vit"), DATA[0])


def agreement(model: torch.nn.Module) -> float:
    return -float((logits(model, DATA[0]) - TARGET).square().mean())


def dump(study: Study) -> str:
    return study.front().drop(columns="seconds").to_json()


class Careless(Strategy):
    """Proposes lists of indices, many of them for genes that cannot matter."""

    def propose(self, n: int):
        return np.random.default_rng(len(self._seen)).integers(0, self.space.sizes, (n, len(self.space))).tolist()


def test_what_a_strategy_of_one_s_own_proposes_is_made_canonical(monkeypatch):
    monkeypatch.setitem(strategies.STRATEGIES, "careless", Careless)
    deep = {"depth": (2,)}
    space = SearchSpace([Gene("depth", (1, 2)), *[Gene(f"width{at}", (1, 2, 3), requires=deep) for at in range(4)]])
    strategy = strategies.create("careless", space, [Objective("x", "min")])
    asked = np.concatenate([strategy.ask(8) for _ in range(3)])
    assert np.array_equal(space.canonical(asked), asked) and len(np.unique(asked, axis=0)) == 24


def test_a_cost_of_one_s_own_is_computed_limited_and_never_measured(supernet, tmp_path):
    def unquantized(genomes: np.ndarray) -> np.ndarray:
        return np.array([list(supernet.space.decode(each).values()).count("none") for each in genomes], dtype=float)

    def quality(model) -> float:
        return agreement(model)

    wanted = ["quality", Objective("unquantized", "min", compute=unquantized)]
    path, limit = tmp_path / "study.db", {"unquantized": "<= 5"}
    jointopt.search(supernet, quality, wanted, evaluations=6, storage=path, constraints=limit).close()
    study = jointopt.search(supernet, quality, wanted, evaluations=12, storage=path, constraints=limit)
    found = study.evaluations()
    assert len(found) == 12 and found["failed"].isna().all()
    assert found["unquantized"].tolist() == unquantized(np.array(found["genome"].tolist())).tolist()
    assert found["unquantized"].max() <= 5
    assert "unquantized" in jointopt.write_report(study, tmp_path / "report.html").read_text()


def test_a_cost_of_one_s_own_named_first_is_not_taken_for_the_quality(supernet):
    few = Objective("few", "min", compute=lambda genomes: -genomes.sum(1) + 0.0)
    study = jointopt.search(supernet, agreement, [few, "quality", "size"], evaluations=12)
    assert study.quality.name == "quality" and [each.name for each in study.measured] == ["quality"]
    best, smallest = study.results(np.stack([study.best(size_mb=1000), study.best(drop=1000)]))
    assert best["quality"] == study.evaluations()["quality"].max()
    assert smallest["size"] == study.evaluations()["size"].min()


@pytest.mark.parametrize("objectives", [{"loss": "max", "size": "min"}, {"loss", "size"}, "size", []])
def test_objectives_are_a_list_since_a_mapping_would_lose_its_directions(supernet, objectives):
    with pytest.raises(JointoptError, match=r"objectives: found .*; allowed: a list of one or more"):
        jointopt.search(supernet, agreement, objectives, evaluations=4)


def test_without_a_measured_objective_the_first_stands_for_the_quality(supernet):
    few = Objective("few", "min", compute=lambda genomes: genomes.sum(1) + 0.0)
    study = jointopt.search(supernet, agreement, [few, "size"], evaluations=3)
    assert study.quality.name == "few" and not study.measured


def test_a_cost_of_one_s_own_that_is_no_number_is_named(supernet):
    wanted = ["quality", Objective("mine", "min", compute=lambda genomes: np.full(len(genomes), np.nan))]
    with pytest.raises(JointoptError, match="objective 'mine': compute gave a value that is not finite"):
        jointopt.search(supernet, agreement, wanted, evaluations=6)


def test_a_cost_of_one_s_own_by_the_name_of_a_known_cost_is_refused(supernet):
    for name in ("size", "latency"):
        wanted = ["quality", Objective(name, "min", compute=lambda genomes: genomes.sum(1) + 1.0)]
        said = f"objective '{name}': found a function for a cost that jointopt computes itself; allowed: another name"
        with pytest.raises(JointoptError, match=said):
            jointopt.search(supernet, agreement, wanted, evaluations=6)


def test_metrics_by_other_names_than_the_objectives_are_shown_with_how_to_ask_for_them(supernet):
    with pytest.raises(JointoptError, match=r"the quality function returns f1; allowed: such as \{'f1': 'max'\}"):
        jointopt.search(supernet, lambda model: {"f1": 0.5}, evaluations=6)


def test_a_damaged_study_says_so_in_one_line(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=20, storage=path).close()
    whole = path.read_bytes()
    for at in range(0, len(whole), 4096):
        path.write_bytes(whole[:at] + b"\xff" * 4000 + whole[at + 4000 :])
        with pytest.raises(JointoptError, match=r"study '.*study.db'"), contextlib.closing(Study.open(path)) as study:
            study.front()
            study.results(supernet.space.sample(3, seed=0))
            raise JointoptError(f"study {str(path)!r}: this page is none that is read")
    (tmp_path / "study.db.lock").write_bytes(b"no lock" * 1000)
    with pytest.raises(JointoptError, match="file is not a database"):
        jointopt.search(supernet, agreement, evaluations=20, storage=path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("UPDATE facts SET value = '{}' WHERE key = 'state'", "the state of its strategy cannot be read: KeyError"),
        ("UPDATE facts SET value = '\"long\"' WHERE key = 'elapsed'", "its elapsed is 'long'"),
        ("UPDATE facts SET value = '[1]' WHERE key = 'baselines'", r"its baselines is \[1\]"),
        ("UPDATE facts SET value = '{\"best\": {}}' WHERE key = 'baselines'", r"its baselines.original is None"),
        ("UPDATE generations SET genomes = '5'", "generation 0 cannot be read: ValueError: cannot reshape"),
        ('UPDATE evaluations SET metrics = \'{"quality": "good"}\'', "evaluation 1 cannot be read: ValueError"),
        ("UPDATE evaluations SET metrics = '[1]'", "evaluation 1 cannot be read: AttributeError"),
    ],
)
def test_a_study_that_was_edited_to_something_else_is_said_to_be_damaged(supernet, tmp_path, edit, said):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=3, storage=path).close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(edit)
    with pytest.raises(JointoptError, match=f"study.db': is damaged: {said}"):
        jointopt.search(supernet, agreement, evaluations=6, storage=path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("UPDATE facts SET value = '{}' WHERE key = 'space'", "its space cannot be read: KeyError: 'genes'"),
        ("UPDATE facts SET value = '[1]' WHERE key = 'objectives'", "its objectives cannot be read: TypeError"),
        ("UPDATE facts SET value = '[1]' WHERE key = 'config'", r"its config is \[1\]"),
        ("UPDATE facts SET value = 'null' WHERE key = 'config'", "its config is None"),
        ("INSERT INTO facts VALUES ('choice', '[3]')", r"its choice is \[3\]"),
        ("INSERT INTO facts VALUES ('baselines', '{\"original\": 3}')", "its baselines.original is 3"),
        ("INSERT INTO facts VALUES ('baselines', '{\"original\": {\"x\": []}}')", r"its baselines.original.x is \[\]"),
        ("INSERT INTO facts VALUES ('finished', '[3]')", r"its finished\[0\] is 3"),
        ("INSERT INTO facts VALUES ('finished', '[{\"genome\": 3}]')", r"its finished\[0\].genome is 3"),
        ("UPDATE evaluations SET genome = '[1, 2]' WHERE number = 2", "evaluation 2 .*: its genome has 2 genes"),
        ("UPDATE generations SET predicted = '[]'", "generation 0 cannot be read: ValueError"),
    ],
)
def test_a_study_that_was_edited_to_something_else_is_not_read(tmp_path, edit, said):
    path = tmp_path / "study.db"
    with contextlib.closing(Study.create(path, SearchSpace([Gene("a", (1, 2))]), [Objective("x", "min")], {})) as made:
        made.add_generation(np.array([[0], [1]]), np.full((2, 1), np.nan), {})
        for at in (0, 1):
            made.add_evaluation(0, np.array([at]), {"x": 1.0}, None, 0.1)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(edit)
    with pytest.raises(JointoptError, match=f"study.db': is damaged: {said}"):
        Study.open(path).front()


def test_the_library_example_finds_a_genome_within_its_budget(supernet):
    study = jointopt.search(supernet, quality=agreement, objectives=["quality", "size"], evaluations=40, seed=0)
    middle = sum(supernet.costs(g)["size"] for g in (supernet.space.smallest, supernet.space.largest)) / 2e6
    genome = study.best(size_mb=middle)
    assert supernet.costs(genome)["size"] <= middle * 1e6
    with supernet.active(genome) as small:
        expected = study.results(genome[None])[0]["quality"]
        assert agreement(small) == pytest.approx(expected)
    assert len(study) == 40 and len(study.front()) > 3
    assert study.baselines["original"]["quality"] == pytest.approx(0, abs=1e-6)
    assert (np.diff(study.hypervolume_history()) >= 0).all()


def test_two_searches_with_one_seed_are_the_same(supernet):
    first, second = (jointopt.search(supernet, agreement, evaluations=45, seed=3) for _ in range(2))
    assert dump(first) == dump(second)


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


def test_a_search_goes_on_where_it_stopped(supernet, tmp_path):
    whole = jointopt.search(supernet, agreement, evaluations=55)
    for evaluations in (7, 33, 55):
        study = jointopt.search(supernet, agreement, evaluations=evaluations, storage=tmp_path / "study.db")
        assert len(study) == evaluations
        study.close()
    assert dump(Study.open(tmp_path / "study.db")) == dump(whole)


def test_evaluations_taken_out_of_a_study_are_measured_again(supernet, tmp_path):
    path = tmp_path / "study.db"
    with contextlib.closing(jointopt.search(supernet, agreement, evaluations=12, storage=path)) as study:
        whole = study.evaluations().drop(columns="seconds").to_json()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM evaluations WHERE number IN (3, 7)")
    with contextlib.closing(jointopt.search(supernet, agreement, evaluations=12, storage=path)) as study:
        assert study.evaluations().drop(columns="seconds").to_json() == whole


def test_another_config_on_the_same_study_is_refused_with_the_differences(supernet, tmp_path):
    jointopt.search(supernet, agreement, evaluations=5, storage=tmp_path / "study.db", config={"data": "a.csv"}).close()
    with pytest.raises(JointoptError, match='seed was 0, is 1; data was "a.csv", is "b.csv"'):
        jointopt.search(
            supernet, agreement, evaluations=5, storage=tmp_path / "study.db", seed=1, config={"data": "b.csv"}
        )
    assert len(Study.open(tmp_path / "study.db")) == 5


def test_a_second_writer_is_refused_while_readers_are_not(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=5, storage=path).close()

    def quality(model: torch.nn.Module) -> float:
        with pytest.raises(JointoptError, match="another process is writing"):
            jointopt.search(supernet, agreement, evaluations=9, storage=path)
        assert len(Study.open(path)) >= 5
        return agreement(model)

    study = jointopt.search(supernet, quality, evaluations=9, storage=path)
    assert len(study) == 9 and not study.evaluations()["failed"].any()


def test_a_study_that_is_still_open_is_gone_on_with_by_the_same_call_and_a_larger_budget(supernet, tmp_path):
    before = jointopt.search(supernet, agreement, evaluations=5, storage=tmp_path / "study.db")
    assert len(jointopt.search(supernet, agreement, evaluations=9, storage=tmp_path / "study.db")) == 9
    before.note("mine", 1)
    assert len(before) == 9


def test_failures_are_recorded_and_the_search_goes_on(supernet):
    calls = iter(range(1000))

    def shaky(model: torch.nn.Module) -> float:
        call = next(calls)
        if call % 5 == 3:
            raise RuntimeError("out of luck")
        return float("nan") if call % 5 == 4 else agreement(model)

    study = jointopt.search(supernet, shaky, evaluations=50)
    failed = study.evaluations()["failed"].dropna()
    assert len(failed) == 20
    assert {"RuntimeError: out of luck"} < set(failed) and failed.str.contains("finite number").sum() == 10
    assert np.isfinite(study.front()["quality"]).all()


def test_an_evaluation_that_lacks_an_objective_has_failed_by_name(supernet):
    calls = iter(range(1000))

    def forgetful(model: torch.nn.Module) -> dict[str, float]:
        return {"accuracy": agreement(model)} | ({} if next(calls) == 3 else {"kl": 1.0})

    study = jointopt.search(supernet, forgetful, ["accuracy", "kl", "size"], evaluations=8)
    assert len(study) == 8
    assert study.evaluations()["failed"].dropna().tolist() == ["quality returned no 'kl'"]


def test_a_function_that_always_fails_stops_the_search(supernet, tmp_path):
    calls = iter(range(1000))

    def broken(model: torch.nn.Module) -> float:
        if next(calls):
            raise KeyError("label")
        return 1.0

    with pytest.raises(JointoptError, match="all 5 evaluations failed, 5 of them with KeyError"):
        jointopt.search(supernet, broken, evaluations=50, storage=tmp_path / "study.db")
    assert Study.open(tmp_path / "study.db").evaluations()["failed"].notna().all()


def failing(*at: int):
    """A quality function that fails in these calls; call 0 is the original's."""
    calls = iter(range(1000))

    def quality(model: torch.nn.Module) -> float:
        if next(calls) in at:
            raise RuntimeError("data not mounted")
        return agreement(model)

    return quality


def test_a_study_of_which_all_failed_is_begun_anew_once_the_cause_is_gone(supernet, tmp_path):
    path = tmp_path / "study.db"
    with pytest.raises(JointoptError, match="all 5 evaluations failed"):
        jointopt.search(supernet, failing(*range(1, 9)), evaluations=12, storage=path)
    with pytest.warns(UserWarning, match="all 5 evaluations failed.*not mounted; all of them are evaluated again"):
        study = jointopt.search(supernet, agreement, evaluations=12, storage=path)
    assert dump(study) == dump(jointopt.search(supernet, agreement, evaluations=12))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_failure_ends_no_search_whose_batches_are_of_one(supernet, asynchronous):
    study = jointopt.search(supernet, failing(1), evaluations=6, batch=1, asynchronous=asynchronous)
    assert len(study) == 6 and study.evaluations()["failed"].notna().sum() == 1


def test_a_search_of_few_evaluations_that_all_failed_says_so(supernet):
    with pytest.raises(JointoptError, match="all 2 evaluations failed"):
        jointopt.search(supernet, failing(*range(1, 9)), evaluations=2)


def test_the_given_model_is_untouched_after_an_exception_and_after_ctrl_c():
    model = make("bert").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = Supernet(model, SearchSpace.for_model(model))
    found.calibrate(batches("bert"))
    for error in (RuntimeError("no"), KeyboardInterrupt()):
        calls = iter(range(100))

        def stop(sub_network: torch.nn.Module, error=error, calls=calls) -> float:
            if next(calls) > 3:
                raise error
            return float(logits(sub_network, batches("bert")[0]).mean())

        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                jointopt.search(found, stop, evaluations=8)
        else:
            jointopt.search(found, stop, evaluations=8)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_metrics_and_costs_of_ones_own_can_be_objectives(supernet):
    def metrics(model: torch.nn.Module) -> dict[str, float]:
        return {"agreement": agreement(model), "loss": -agreement(model)}

    study = jointopt.search(supernet, metrics, objectives=["loss", {"agreement": "max"}, "bops"], evaluations=12)
    assert {"loss", "agreement", "bops", "size", "macs"} <= set(study.evaluations().columns)


def test_a_space_of_one_genome_is_evaluated_once():
    model = make("vit")
    found = Supernet(model, SearchSpace.for_model(model, schemes=["W8A16_CHANNEL"], preset="fixed"))
    found.calibrate(batches("vit"))
    assert found.space.count() == 1
    assert len(jointopt.search(found, agreement, evaluations=20)) == 1


def test_errors_name_what_was_found(supernet, tmp_path):
    for arguments, message in (
        ({"objectives": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"objectives": ["accuracy"]}, "returns quality"),
        ({"objectives": ["quality", "quality"]}, "one twice"),
        ({"strategy": "gided"}, "did you mean 'guided'"),
        ({"strategy_options": {"pop": 3}}, "unknown option 'pop'"),
        ({"strategy": "evolutionary", "strategy_options": {"population": 1}}, "population: found 1; .* from 2"),
        ({"strategy_options": {"initial": 2.5}}, "initial: found 2.5"),
        ({"evaluations": 0}, "found 0"),
        ({"storage": tmp_path / "no" / "study.db"}, "does not exist"),
    ):
        with pytest.raises(JointoptError, match=message):
            jointopt.search(supernet, agreement, **{"evaluations": 3, **arguments})
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(JointoptError, match="not a database"):
        jointopt.search(supernet, agreement, evaluations=3, storage=tmp_path / "text.db")
    uncalibrated = Supernet(make("vit"), SearchSpace.for_model(make("vit")))
    with pytest.raises(JointoptError, match="not calibrated"):
        jointopt.search(uncalibrated, agreement, evaluations=3)


def test_another_program_s_database_and_an_empty_one_are_left_as_they_are(supernet, tmp_path):
    path = tmp_path / "notes.db"
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE notes (text)")
    before = path.read_bytes()
    with pytest.raises(JointoptError, match="notes.db' is no study; found tables notes; allowed: facts"):
        Study.open(path)
    with pytest.raises(JointoptError, match="is no study"):
        jointopt.search(supernet, agreement, evaluations=3, storage=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (tmp_path / "empty.db").touch()
    with pytest.raises(JointoptError, match="found tables none"):
        Study.open(tmp_path / "empty.db")
    assert len(jointopt.search(supernet, agreement, evaluations=3, storage=tmp_path / "empty.db")) == 3


def test_numbers_of_numpy_are_numbers(supernet):
    options = {"strategy": "evolutionary", "strategy_options": {"population": np.int64(4)}}
    study = jointopt.search(supernet, agreement, evaluations=np.int64(5), seed=np.int64(3), **options)
    assert len(study) == 5 and study.config["strategy_options"] == {"population": 4} and study.config["seed"] == 3


def test_paths_and_arrays_of_a_config_are_recorded_as_json_has_them(supernet):
    prior = {"quality": [np.zeros(size) for size in supernet.space.sizes]}
    config = {"data": Path("a.csv"), "limits": (np.float32(0.5), np.arange(2))}
    study = jointopt.search(supernet, agreement, evaluations=3, config=config, strategy_options={"prior": prior})
    assert study.config["data"] == "a.csv" and study.config["limits"] == [0.5, [0, 1]]
    assert study.config["strategy_options"]["prior"]["quality"][0] == [0.0] * int(supernet.space.sizes[0])


def test_what_json_cannot_hold_is_refused_by_its_key(supernet):
    for config, said in (
        ({"data": {"rows": {1, 2}}}, r"config.data.rows: found \{1, 2\}; allowed: text, numbers"),
        ({"data": {(1, 2): 3}}, r"config.data: found the key \(1, 2\); allowed: text or whole numbers"),
    ):
        with pytest.raises(JointoptError, match=said):
            jointopt.search(supernet, agreement, evaluations=3, config=config)


def test_a_study_of_another_version_is_refused(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=3, storage=path).close()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE facts SET value = '1' WHERE key = 'version'")
    with pytest.raises(JointoptError, match="study.db': found version 1; allowed: 3"):
        Study.open(path)
    with pytest.raises(JointoptError, match="version was 1, is 3"):
        jointopt.search(supernet, agreement, evaluations=3, storage=path)


@pytest.mark.parametrize("wrong", ["UPDATE facts SET value = '1' WHERE key = 'version'", "DROP TABLE facts"])
def test_a_study_that_is_refused_is_closed(wrong, tmp_path):
    path = tmp_path / "study.db"
    Study.create(path, SearchSpace([Gene("a", (1, 2))]), [Objective("x", "min")], {}).close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(wrong)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(JointoptError) as kept:
        Study.open(path)
    assert len(os.listdir("/proc/self/fd")) == len(before), kept


def test_a_study_that_has_asked_for_nothing_is_begun_anew_by_another_search(supernet, tmp_path):
    path = tmp_path / "study.db"
    with contextlib.closing(Study.create(path, supernet.space, [Objective("loss", "min")], {"seed": 7})) as begun:
        begun.note("baselines", {"original": {"loss": 1.0}})
    with contextlib.closing(jointopt.search(supernet, agreement, evaluations=3, storage=path)) as study:
        assert len(study) == 3 and "loss" not in study.baselines["original"]


def test_a_study_of_another_super_network_is_refused_in_one_line(supernet, tmp_path):
    path, before = tmp_path / "study.db", "0f" * 32  # as long as fingerprints were
    jointopt.search(supernet, agreement, evaluations=3, storage=path).close()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE facts SET value = json_set(value, '$.supernet', ?) WHERE key = 'config'", (before,))
    with pytest.raises(JointoptError) as refused:
        jointopt.search(supernet, agreement, evaluations=3, storage=path)
    assert f'has another config: supernet was "{before[:50]}' in str(refused.value)
    assert f'is "{supernet.fingerprint()}"; allowed: that one' in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(JointoptError, match="no longer what the study searched"):
        jointopt.export(supernet, supernet.space.largest, tmp_path / "out", study=Study.open(path))


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


FORKED = """
import os, sys, time, torch, jointopt
torch.set_num_threads(1)
from tests.zoo import batches, logits, make
model = make("vit")
supernet = jointopt.Supernet(model, jointopt.SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16"]))
supernet.calibrate(batches("vit"))
data = batches("vit", seed=5)[0]
target = logits(make("vit"), data)
def quality(view):
    time.sleep(0.02)
    return -float((logits(view, data) - target).square().mean())
for name in map(str.strip, sys.stdin):
    if process := os.fork():
        print(process, flush=True)
        print(os.waitpid(process, 0)[1], flush=True)
        continue
    options = {"generations": 10}
    study = jointopt.search(supernet, quality, evaluations=70, storage=name + ".db", strategy_options=options)
    study.front().drop(columns="seconds").to_json(name + ".json")
    os._exit(0)
"""


@pytest.mark.slow
def test_ten_kills_leave_the_front_byte_for_byte_as_it_would_have_been(tmp_path):
    """One process forks those that search, which then need not load what it has loaded."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    forks = subprocess.Popen(
        [sys.executable, "-c", FORKED],
        cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert forks.stdin is not None and forks.stdout is not None

    def search(name: str, seconds: float | None = None) -> int:
        """How a search ended that was killed after so long, if it was still there."""
        print(name, file=forks.stdin, flush=True)
        process = int(forks.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return int(forks.stdout.readline())

    assert search("whole") == 0
    chance = random.Random(0)
    ends = [search("killed", chance.uniform(0.05, 0.5)) for _ in range(10)]
    assert search("killed") == 0
    forks.stdin.close()
    assert forks.wait(timeout=60) == 0
    assert ends.count(signal.SIGKILL) >= 5
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert len(json.loads((tmp_path / "whole.json").read_text())["number"]) > 2


def test_hypervolume_is_measured_where_the_first_evaluations_all_failed(supernet):
    calls = iter(range(100))

    def quality(model: torch.nn.Module) -> float:
        if 0 < next(calls) <= 11:
            raise ValueError("not yet")
        return agreement(model)

    study = jointopt.search(supernet, quality, evaluations=14, batch=14, strategy="random")
    assert study.evaluations()["failed"].notna().sum() == 11 and study.reference_point() is not None


def test_a_study_that_goes_on_by_another_quality_function_is_told(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=4, storage=path).close()
    with pytest.raises(JointoptError, match="objective 'quality': the quality function returns acc"):
        jointopt.search(supernet, lambda model: {"acc": 7.0}, evaluations=8, storage=path)
    with pytest.warns(UserWarning, match="quality of the original is 7, and was -.* when the study began"):
        study = jointopt.search(supernet, lambda model: 7.0, evaluations=8, storage=path)
    assert len(study) == 8
    study.close()


def test_a_link_to_a_study_is_that_study(tmp_path):
    space = SearchSpace([Gene("a", (1, 2, 3))])
    (tmp_path / "kept").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "kept" / "study.db")
    with contextlib.closing(
        Study.create(tmp_path / "kept" / "study.db", space, [Objective("error", "min")], {})
    ) as one:
        one.note("b", 1)
        assert Study.open(tmp_path / "link.db").fact("b") == 1


READ_BY_ANOTHER = """
import os, sys
import jointopt.report.page, jointopt

if not os.getuid():
    os.setgid(65534)
    os.setuid(65534)
study = jointopt.Study.open(sys.argv[1])
print(len(study.evaluations()), len(study.front()) > 0)
"""


def test_a_study_that_cannot_be_written_to_can_be_read():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        space = SearchSpace([Gene("a", (1, 2, 3)), Gene("b", (1, 2))])
        study = Study.create(folder / "s?%20.db", space, [Objective("error", "min")], {})
        genomes = space.sample(4, seed=0)
        study.add_generation(genomes, np.full((4, 1), np.nan), {})
        for error, genome in enumerate(genomes):
            study.add_evaluation(0, genome, {"error": float(error)}, None, 0.1)
        study.close()
        (folder / "s?%20.db.lock").unlink()
        for path, mode in ((folder / "s?%20.db", 0o444), (folder, 0o555)):
            path.chmod(mode)
        command = [sys.executable, "-c", READ_BY_ANOTHER, str(folder / "s?%20.db")]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=100)
        folder.chmod(0o755)
        assert done.stdout.split() == ["4", "True"], done.stderr
