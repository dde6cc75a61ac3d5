"""Models whose outputs are not one class of several: several classes at once, and measured values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jointopt
from jointopt import Distillation, ElasticTrainer, JointoptError, Recipe, SearchSpace, Supernet
from jointopt.training.distillation import soft_labels
from jointopt.training.sampling import step_seed
from tests.elastic_trainers import arguments
from tests.test_training import still
from tests.test_training_inputs import Uniform
from tests.zoo import batches, make

PROBLEMS = ("multi_label_classification", "regression")


def supernet_for(problem: str | None, outputs: int = 5) -> Supernet:
    model = make("bert")
    model.config.problem_type, model.config.num_labels = problem, outputs
    model.classifier, model.num_labels = nn.Linear(model.config.hidden_size, outputs), outputs
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(batches("bert"))
    return supernet


def labelled(problem: str, outputs: int = 5) -> list[dict]:
    drawn = torch.rand(2, 6, outputs, generator=torch.Generator().manual_seed(0))
    labels = (drawn > 0.5).float() if problem.startswith("multi") else 4 * drawn
    return [{**batch, "labels": each} for batch, each in zip(batches("bert", count=2), labels, strict=True)]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("outputs", [1, 5])
def test_the_largest_learns_what_transformers_would_have_it_learn(problem, outputs):
    supernet, batch = supernet_for(problem, outputs), labelled(problem, outputs)[0]
    still(supernet.model)
    loss = jointopt.elastic_loss(supernet, batch, 0, Recipe(Uniform(0)))
    torch.testing.assert_close(loss, supernet.model(**batch).loss)


def test_one_output_of_which_nothing_is_said_is_a_measured_value_as_transformers_has_it():
    supernet, batch = supernet_for(None, 1), labelled("regression", 1)[0]
    still(supernet.model)
    loss = jointopt.elastic_loss(supernet, batch, 0, Recipe(Uniform(0)))
    torch.testing.assert_close(loss, supernet.model(**batch).loss)
    assert jointopt.elastic_loss(supernet, batch, 0, Recipe(Uniform(1))) > loss


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_sub_network_learns_the_outputs_of_the_largest(problem):
    supernet, batch = supernet_for(problem), labelled(problem)[0]
    still(supernet.model)
    sampling = Uniform(1)
    (genome,) = sampling.genomes(supernet.space, 0.0, step_seed(0, 0))
    found = jointopt.elastic_loss(supernet, batch, 0, Recipe(sampling))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    student, teacher = (supernet.training_view(g, False)(**inputs).logits for g in (genome, supernet.space.largest))
    learned = soft_labels(student, teacher, problem=problem)
    torch.testing.assert_close(found, supernet.model(**batch).loss + learned)
    assert learned > 0


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_finished_sub_network_comes_closer_to_the_original(problem):
    supernet, given = supernet_for(problem), labelled(problem)
    inputs = {name: value for name, value in given[0].items() if name != "labels"}
    with torch.no_grad(), supernet.original() as original:
        expected = original(**inputs).logits
        before = supernet.extract(supernet.space.smallest)(**inputs).logits
        finished = jointopt.finish(supernet, supernet.space.smallest, given, steps=40, learning_rate=1e-3).model
        assert (finished(**inputs).logits - expected).square().mean() < (before - expected).square().mean() / 2


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_trainer_evaluates_by_the_loss_that_it_trains(problem, tmp_path):
    supernet = supernet_for(problem)
    rows = [{name: value[at] for name, value in batch.items()} for batch in labelled(problem) for at in range(6)]
    trainer = ElasticTrainer(
        supernet=supernet, args=arguments(tmp_path, max_steps=2), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    with torch.no_grad():
        whole = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        expected = supernet.model.eval()(**whole).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(JointoptError, match="label_smoothing_factor 0.1 beside a loss that is not of one class"):
        ElasticTrainer(supernet=supernet, args=arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows)


def test_labels_that_do_not_fit_the_problem_are_named():
    batch = labelled("multi_label_classification")[0]
    one_class = {**batch, "labels": torch.zeros(6, dtype=torch.long)}
    supernet = supernet_for("multi_label_classification")
    with pytest.raises(JointoptError, match=r"labels are int64 \[6\], logits \[6, 5\].*one label for each"):
        jointopt.elastic_loss(supernet, one_class, 0)
    with pytest.raises(JointoptError, match="labels: found 3; allowed: 0 to 1, for each class by itself"):
        jointopt.elastic_loss(supernet, {**batch, "labels": 3 * torch.ones(6, 5)}, 0)


def test_a_regression_has_no_temperature():
    recipe = Recipe(distillation=Distillation(temperature=2.0))
    with pytest.raises(JointoptError, match="temperature: found 2.0 for a regression, which has no distribution"):
        jointopt.elastic_loss(supernet_for("regression"), labelled("regression")[0], 0, recipe)


def test_whole_numbers_that_are_measured_are_no_tokens(tmp_path):
    (first, *_) = labelled("regression", 1)
    rows = [{"input_ids": ids, "labels": [at]} for at, ids in enumerate(first["input_ids"])]
    trained = supernet_for("regression", 1)
    made = ElasticTrainer(
        model=trained.model, args=arguments(tmp_path, max_steps=1), train_dataset=rows, eval_dataset=rows
    )
    assert made.evaluate()["eval_loss"] > 1
