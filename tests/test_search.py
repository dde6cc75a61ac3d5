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
import time
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


def test_a_cost_of_one_s_own_may_write_to_the_genomes_that_it_is_given(supernet):
    def first_gene_aside(genomes: np.ndarray) -> np.ndarray:
        genomes[:, 0] = 0
        return genomes.sum(1)

    found = jointopt.search(
        supernet, agreement, ["size", Objective("mine", "min", compute=first_gene_aside), "quality"], evaluations=8
    ).evaluations()
    sizes = supernet.cost_columns(np.array(found["genome"].tolist()))["size"]
    assert found["size"].tolist() == sizes.tolist()


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (
            lambda genomes: (genomes.sum(1) + 1) / (genomes.sum(1).max() + 1),
            "compute gave 1 for a genome by itself, and",
        ),
        (lambda genomes: genomes.sum(1).astype(str), "compute gave <U21; allowed: numbers"),
        (lambda genomes: genomes.sum(1) + 1j, "compute gave complex128; allowed: numbers"),
    ],
)
def test_a_cost_of_one_s_own_that_is_not_of_each_genome_alone_is_refused(compute, said, supernet):
    with pytest.raises(JointoptError, match=f"objective 'mine': {said}"):
        jointopt.search(supernet, agreement, ["quality", Objective("mine", "min", compute=compute)], evaluations=6)


def test_costs_of_one_s_own_may_differ_in_last_bits_and_come_as_python_s_numbers(supernet, tmp_path):
    bits, asked = np.array([16, 4, 8], dtype=object), iter(range(10**6))

    def compute(genomes: np.ndarray) -> np.ndarray:
        return bits[genomes % 3].sum(1) + np.array([next(asked) % 30 * 1e-7 for _ in genomes], dtype=object)

    wanted = ["quality", Objective("bits", "min", compute=compute)]
    for evaluations in (4, 8):
        path = tmp_path / "study.db"
        study = jointopt.search(supernet, agreement, wanted, evaluations=evaluations, storage=path)
        assert len(study) == evaluations
        study.close()


def test_a_study_does_not_go_on_with_another_cost_by_the_same_name(supernet, tmp_path):
    def searched(compute, evaluations: int):
        wanted = ["quality", Objective("watts", "min", compute=compute)]
        return jointopt.search(supernet, agreement, wanted, evaluations=evaluations, storage=tmp_path / "study.db")

    searched(lambda genomes: genomes.sum(1), 6).close()
    with pytest.raises(
        JointoptError, match=r"objective 'watts': compute gives .* for evaluation 1, for which the study"
    ):
        searched(lambda genomes: 1000 - genomes.sum(1), 12)
    assert len(searched(lambda genomes: genomes.sum(1), 8)) == 8


def test_a_cost_of_one_s_own_by_the_name_of_a_metric_is_refused(supernet):
    wanted = ["size", Objective("quality", "max", compute=lambda genomes: genomes.sum(1))]
    with pytest.raises(JointoptError, match="objective 'quality': found a function for what the quality function"):
        jointopt.search(supernet, agreement, wanted, evaluations=6)


def test_a_strategy_of_one_s_own_that_proposes_nothing_is_told_so(monkeypatch):
    monkeypatch.setitem(strategies.STRATEGIES, "silent", type("Silent", (Strategy,), {"propose": lambda self, n: None}))
    strategy = strategies.create("silent", SearchSpace([Gene("depth", (1, 2))]), [Objective("x", "min")])
    with pytest.raises(JointoptError, match=r"Silent.propose: returned None; allowed: genomes"):
        strategy.ask(2)


def test_a_cost_of_one_s_own_by_the_name_of_a_known_cost_is_refused(supernet):
    for name in ("size", "latency"):
        wanted = ["quality", Objective(name, "min", compute=lambda genomes: genomes.sum(1) + 1.0)]
        said = f"objective '{name}': found a function for a cost that jointopt computes itself; allowed: another name"
        with pytest.raises(JointoptError, match=said):
            jointopt.search(supernet, agreement, wanted, evaluations=6)


def test_metrics_by_other_names_than_the_objectives_are_shown_with_how_to_ask_for_them(supernet):
    with pytest.raises(JointoptError, match=r"the quality function returns f1; allowed: such as \{'f1': 'max'\}"):
        jointopt.search(supernet, lambda model: {"f1": 0.5}, evaluations=6)


def test_the_library_example_finds_a_genome_within_its_budget(supernet):
    study = jointopt.search(supernet, quality=agreement, objectives=["quality", "size"], evaluations=40, seed=0)
    middle = sum(supernet.costs(g)["size"] for g in (supernet.space.smallest, supernet.space.largest)) / 2e6
    genome = study.best(size_mb=middle)
    assert supernet.costs(genome)["size"] <= middle * 1e6
    with supernet.active(genome) as small:
        expected = study.results(genome[None])[0]["quality"]
        assert agreement(small) == pytest.approx(expected)
    assert len(study) == 40 and len(study.front()) > 3
    assert study.original["quality"] == pytest.approx(0, abs=1e-6)
    assert (np.diff(study.hypervolume_history()) >= 0).all()


def test_two_searches_with_one_seed_are_the_same(supernet):
    first, second = (jointopt.search(supernet, agreement, evaluations=45, seed=3) for _ in range(2))
    assert dump(first) == dump(second)


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


def test_numbers_of_numpy_are_numbers(supernet):
    options = {"strategy": "evolutionary", "strategy_options": {"population": np.int64(4)}}
    study = jointopt.search(supernet, agreement, evaluations=np.int64(5), seed=np.int64(3), **options)
    assert len(study) == 5 and study.config["strategy_options"] == {"population": 4} and study.config["seed"] == 3


def test_a_study_that_has_asked_for_nothing_is_begun_anew_by_another_search(supernet, tmp_path):
    path = tmp_path / "study.db"
    with contextlib.closing(Study.create(path, supernet.space, [Objective("loss", "min")], {"seed": 7})) as begun:
        begun.note("baselines", {"original": {"loss": 1.0}})
    with contextlib.closing(jointopt.search(supernet, agreement, evaluations=3, storage=path)) as study:
        assert len(study) == 3 and "loss" not in study.original


def test_a_study_of_another_super_network_is_refused_in_one_line(supernet, tmp_path):
    path, before = tmp_path / "study.db", "0f" * 32  # as long as fingerprints were
    jointopt.search(supernet, agreement, evaluations=3, storage=path).close()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE facts SET value = json_set(value, '$.supernet', ?) WHERE key = 'config'", (before,))
    with pytest.raises(JointoptError) as refused:
        jointopt.search(supernet, agreement, evaluations=3, storage=path)
    assert f'has another config: supernet was "{before[:50]}' in str(refused.value)
    assert f'is "{supernet.fingerprint()}" (other weights, space or calibration, another version' in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(JointoptError, match="no longer what the study searched"):
        jointopt.export(supernet, supernet.space.largest, tmp_path / "out", study=Study.open(path))


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


def test_a_study_that_goes_on_by_other_costs_is_told(supernet, tmp_path):
    study = jointopt.search(supernet, lambda _: 1.0, evaluations=2, storage=tmp_path / "study.db")
    study.note("baselines", {"original": {**study.original, "size": 7}})
    study.close()
    with pytest.warns(UserWarning, match="size of the original is .*, and was 7 when the study began: anot"):
        jointopt.search(supernet, lambda _: 1.0, evaluations=3, storage=tmp_path / "study.db")


def test_a_study_that_goes_on_by_another_quality_function_is_told(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=4, storage=path).close()
    with pytest.raises(JointoptError, match="objective 'quality': the quality function returns acc"):
        jointopt.search(supernet, lambda model: {"acc": 7.0}, evaluations=8, storage=path)
    with pytest.warns(UserWarning, match="quality of the original is 7, and was -.* when the study began"):
        study = jointopt.search(supernet, lambda model: 7.0, evaluations=8, storage=path)
    assert len(study) == 8
    study.close()
