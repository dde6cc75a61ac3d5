"""Metrics with their standard errors, on a part of the data and on data that the search never saw."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from jointopt import JointoptError, SearchSpace, Study, Supernet, finish, rescore_finished, rescore_front, search
from jointopt.config.config import load_config
from jointopt.evaluation.evaluation import Metrics, evaluate, measured
from jointopt.evaluation.sharing import SharedEvaluator
from jointopt.report.page import write_report
from jointopt.report.terminal import finished_table, front_table
from jointopt.study.rescoring import rescored, rescored_finished
from jointopt.tasks.problems import NEXT_TOKEN, ONE_CLASS
from tests.zoo import batches, make


class Given(nn.Module):
    """A model whose logits are its inputs."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class Shifted(nn.Module):
    """Its input, and what is added to it."""

    def __init__(self, added: torch.Tensor):
        super().__init__()
        self.added = added

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.added


def table(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(4, (count,), generator=generator)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 40), size=st.integers(1, 40))
def test_errors_are_those_of_a_mean_over_samples_however_they_are_batched(count, size):
    logits, labels = table(count)
    parts = [{"logits": x, "labels": y} for x, y in zip(logits.split(size), labels.split(size), strict=True)]
    found = ONE_CLASS.quality(parts)(Given())
    losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
    right = (logits.argmax(-1) == labels).double().numpy()
    assert math.isclose(found["loss"], losses.mean(), rel_tol=1e-5)
    assert math.isclose(found["accuracy"], right.mean(), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(found.errors["loss"], losses.std(ddof=1) / count**0.5, rel_tol=1e-4, abs_tol=1e-6)
    assert math.isclose(found.errors["accuracy"], right.std(ddof=1) / count**0.5, rel_tol=1e-6, abs_tol=1e-9)


def test_tokens_of_one_text_count_as_one_sample():
    logits, labels = table(6)
    once = {"logits": logits[:, None].repeat(1, 2, 1), "labels": labels[:, None].repeat(1, 2)}
    often = {"logits": logits[:, None].repeat(1, 9, 1), "labels": labels[:, None].repeat(1, 9)}
    few, many = (NEXT_TOKEN.quality([batch])(Given()) for batch in (once, often))
    assert math.isclose(few["loss"], many["loss"], rel_tol=1e-5)
    assert math.isclose(few.errors["loss"], many.errors["loss"], rel_tol=1e-4)
    assert math.isclose(few.errors["perplexity"], few["perplexity"] * few.errors["loss"])


def test_masked_tokens_belong_to_no_sample():
    logits, labels = table(6)
    labels = labels[:, None].repeat(1, 5)
    labels[0, 2:] = -100
    found = NEXT_TOKEN.quality([{"logits": logits[:, None].repeat(1, 5, 1), "labels": labels}])
    losses = nn.functional.cross_entropy(logits.double(), labels[:, 1], reduction="none").numpy()
    counts = np.array([1, 4, 4, 4, 4, 4])
    mean = (losses * counts).sum() / counts.sum()
    error = math.sqrt(((losses - mean) ** 2 * counts**2).sum() * 6 / 5) / counts.sum()
    assert math.isclose(found(Given())["loss"], mean, rel_tol=1e-5)
    assert math.isclose(found(Given()).errors["loss"], error, rel_tol=1e-4)


def test_scores_of_a_large_vocabulary_are_those_of_all_logits_at_once():
    generator = torch.Generator().manual_seed(0)
    shape = (2, 9, 2**16)  # a few rows of these are scored at a time
    logits, original = torch.randn(2, *shape, generator=generator)
    labels = torch.randint(shape[-1], shape[:2], generator=generator)
    labels[1, 6:] = -100
    batch = {"logits": logits, "labels": labels}
    found = NEXT_TOKEN.quality([batch], Shifted(original - logits))(Given())
    rows, wanted = logits[:, :-1][labels[:, 1:] != -100].double(), labels[:, 1:][labels[:, 1:] != -100]
    reference = original[:, :-1][labels[:, 1:] != -100].double()
    divergence = nn.functional.kl_div(
        rows.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert math.isclose(found["loss"], nn.functional.cross_entropy(rows, wanted), rel_tol=1e-5)
    assert math.isclose(found["accuracy"], (rows.argmax(-1) == wanted).double().mean(), abs_tol=1e-9)
    assert math.isclose(found["kl"], divergence, rel_tol=1e-4)


def bert() -> Supernet:
    model = make("bert")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W4A16"]))
    supernet.calibrate(batches("bert"))
    return supernet


def labelled(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{**batch, "labels": torch.randint(3, (6,), generator=generator)} for batch in batches("bert", seed=seed)]


def test_an_evaluation_holds_the_errors_of_its_metrics():
    supernet, quality = bert(), ONE_CLASS.quality(labelled(1))
    genomes = supernet.space.sample(3, seed=0)
    alone = [evaluate(supernet, genome, quality) for genome in genomes]
    assert all(set(each.errors) == {"accuracy", "loss"} for each in alone)
    shared = dict(SharedEvaluator(supernet, quality).evaluate(genomes))
    assert [(shared[at].metrics, shared[at].errors) for at in range(3)] == [(e.metrics, e.errors) for e in alone]


@pytest.mark.parametrize("errors", [{"loss": -1.0}, {"other": 1.0}, {"loss": math.nan}])
def test_errors_that_are_none_are_refused(errors):
    with pytest.raises(JointoptError, match="quality returned"):
        measured(lambda model: Metrics({"loss": 1.0}, errors), nn.Identity())


@pytest.fixture(scope="module")
def searched() -> tuple[Supernet, Study]:
    supernet = bert()
    quality = ONE_CLASS.quality(labelled(1))
    return supernet, search(supernet, quality, ["loss", "size"], 12)


def test_the_front_is_scored_again_and_once(searched):
    supernet, study = searched
    unseen = ONE_CLASS.quality(labelled(2))
    rescore_front(supernet, study, unseen)
    found = rescored(study)
    assert set(found) == {None, *study.front()["genome"]}
    for genome, record in found.items():
        if genome is not None:
            again = evaluate(supernet, np.array(genome), unseen)
            assert record["metrics"]["loss"] == again.metrics["loss"] and record["errors"] == again.errors
    rescore_front(supernet, study, lambda model: pytest.fail("scored twice"))


def test_scores_on_other_unseen_data_are_forgotten_and_those_on_the_same_kept(searched):
    supernet, study = searched
    rescore_front(supernet, study, ONE_CLASS.quality(labelled(2)), "two")
    before = rescored(study)
    rescore_front(supernet, study, ONE_CLASS.quality(labelled(3)), "two")
    assert rescored(study) == before
    rescore_front(supernet, study, ONE_CLASS.quality(labelled(3)), "three")
    after = rescored(study)
    assert set(after) == set(before)
    assert all(after[genome]["metrics"] != before[genome]["metrics"] for genome in before)


def test_both_scores_are_shown(searched, tmp_path):
    supernet, study = searched
    rescore_front(supernet, study, ONE_CLASS.quality(labelled(2)))
    console = Console(file=io.StringIO(), width=200)
    console.print(front_table(study))
    value = rescored(study)[None]["metrics"]["loss"]
    for text in (console.file.getvalue(), write_report(study, tmp_path / "report.html").read_text()):
        assert "loss (nats), unseen data" in text and f"{value:,.6g} ±" in text


def test_what_was_finished_is_scored_on_unseen_data_too_and_once(searched, tmp_path):
    supernet, study = searched
    unseen = ONE_CLASS.quality(labelled(2))
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in labelled(1)]
    genome = np.array(study.front()["genome"].iloc[0])
    finished = finish(supernet, genome, inputs, quality=ONE_CLASS.quality(labelled(1)))
    study.add_finished(finished.genome, finished.rounding, finished.metrics, finished.seconds)
    rescore_front(supernet, study, unseen)
    before = rescored(study)
    rescore_finished(study, finished, unseen)
    rescore_finished(study, finished, lambda model: pytest.fail("scored twice"))
    ((key, record),) = rescored_finished(study).items()
    assert key == (tuple(finished.genome), "gptq") and record["metrics"] == dict(unseen(finished.model))
    assert rescored(study) == before
    console = Console(file=io.StringIO(), width=200)
    console.print(finished_table(study, genome))
    for text in (console.file.getvalue(), write_report(study, tmp_path / "report.html").read_text()):
        assert f"{record['metrics']['loss']:,.6g} ±" in text


def test_unseen_data_is_other_data_and_does_not_change_a_study(tmp_path):
    text = "model: m\ntask: image-classification\ndata: {{calibrate: a, evaluate: b{}}}\noutput: o\n"
    without, other, same = (tmp_path / name for name in ("without.yaml", "other.yaml", "same.yaml"))
    for path, test in ((without, ""), (other, ", test: c"), (same, ", test: b")):
        path.write_text(text.format(test))
    assert load_config(other).record() == load_config(without).record()
    assert load_config(other).source("test").path == "c"
    with pytest.raises(JointoptError, match="data.test is data.evaluate"):
        load_config(same)
