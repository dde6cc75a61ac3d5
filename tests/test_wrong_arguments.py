"""What is of the wrong kind altogether is named at once, in one line, by every way in."""

from __future__ import annotations

import re

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch.nn.utils import prune

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.models import find_source
from jointopt.rows import DataSource
from tests.zoo import batches, make

MODEL = make("bert")
SPACE = SearchSpace.for_model(MODEL, schemes=["W8A8", "W4A16"])


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    made = Supernet(MODEL, SPACE)
    made.calibrate(batches("bert"))
    return made


def labelled() -> list[dict]:
    return [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)} for batch in batches("bert")]


MODEL_FOR_SUPERNET = "found a BertForSequenceClassification; allowed: a Supernet"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jointopt.search(MODEL, quality=lambda model: 0.5, evaluations=2), f"search: {MODEL_FOR_SUPERNET}"),
        (lambda: jointopt.finish(MODEL, SPACE.largest, batches("bert")), f"finish: {MODEL_FOR_SUPERNET}"),
        (lambda: jointopt.export(MODEL, SPACE.largest, "somewhere"), f"export: {MODEL_FOR_SUPERNET}"),
        (lambda: jointopt.elastic_loss(MODEL, labelled()[0], 0), f"train: {MODEL_FOR_SUPERNET}"),
        (lambda: jointopt.train_supernet(MODEL, labelled(), 1), f"train: {MODEL_FOR_SUPERNET}"),
    ],
)
def test_a_model_in_place_of_a_super_network(call, said):
    with pytest.raises(JointoptError, match=said):
        call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Supernet(None, SPACE), "model: found None; allowed: a torch.nn.Module"),
        (lambda: Supernet("bert", SPACE), "model: found 'bert'; allowed: a torch.nn.Module"),
        (lambda: Supernet(MODEL.state_dict(), SPACE), "model: found a OrderedDict; allowed: a torch.nn.Module"),
        (lambda: Supernet(Supernet(MODEL, SPACE), SPACE), "model: found a Supernet; allowed: a torch.nn.Module"),
        (lambda: Supernet(MODEL, "vit"), "space: found 'vit'; allowed: a SearchSpace"),
        (lambda: SearchSpace.for_model(MODEL, schemes="W8A8"), "schemes: found 'W8A8'; allowed: a list of names"),
        (lambda: SearchSpace.for_model(MODEL, schemes=[]), "schemes: found none; allowed: one or more"),
        (lambda: Supernet(MODEL, SPACE, latency="h100"), "latency: found 'h100'; allowed: a model of it"),
        (lambda: Supernet(MODEL, SPACE, repair="no"), "repair: found 'no'; allowed: True or False"),
        (lambda: SPACE.sample(-1, seed=0), "sample: n: found -1; allowed: a whole number from 0"),
        (lambda: jointopt.Study.open("tests"), "study: 'tests' is a folder"),
        (lambda: jointopt.verify(None), "verify: folder: found None; allowed: a path"),
        (lambda: jointopt.Study.open(3), "study: found 3; allowed: a path"),
        (lambda: jointopt.ElasticTrainer(MODEL, SPACE, {}, labelled()), "args: found a dict; allowed: TrainingArgum"),
    ],
)
def test_something_else_altogether(call, said):
    with pytest.raises(JointoptError, match=said):
        call()


@pytest.mark.parametrize("name", ["bert", "llama_tied", "vit", "resnet"])
def test_a_model_with_weights_that_are_no_numbers(name):
    model = make(name)
    path, weight = list(model.named_parameters())[-2]
    with torch.no_grad():
        weight.view(-1)[-1] = float("nan")
    with pytest.raises(JointoptError, match=f"^{re.escape(path)}: found NaN or infinity; allowed: finite numbers$"):
        Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))


def test_a_model_made_in_inference_mode_is_taken():
    with torch.inference_mode():
        model = make("bert")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(batches("bert"))
    study = jointopt.search(supernet, lambda model: float(model(**batches("bert")[0]).logits.mean()), evaluations=2)
    assert len(study) == 2


@pytest.mark.parametrize("options", [{}, {"steps": 1}])
def test_an_empty_batch(options, supernet):
    with pytest.raises(JointoptError, match="finish: found an empty batch"):
        jointopt.finish(supernet, supernet.space.smallest, [{}], **options)


def test_a_checkpoint_that_is_no_path(supernet):
    with pytest.raises(JointoptError, match="train: checkpoint: found 3; allowed: a path"):
        jointopt.train_supernet(supernet, labelled(), 1, checkpoint=3)
    with pytest.raises(JointoptError, match="train: checkpoint: 'tests' is a folder; allowed: a file"):
        jointopt.train_supernet(supernet, labelled(), 1, checkpoint="tests")


LONG = "a" * 256
"""A byte longer than file systems hold."""


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda made: jointopt.export(made, made.space.largest, LONG), "export"),
        (lambda made: jointopt.verify(LONG), "verify"),
        (lambda made: jointopt.Study.open(LONG), "study"),
        (lambda made: jointopt.search(made, quality=lambda model: 0.5, evaluations=2, storage=LONG), "storage"),
        (lambda made: jointopt.train_supernet(made, labelled(), 1, checkpoint=LONG), "train: checkpoint"),
        (lambda made: find_source(LONG), "model"),
        (lambda made: DataSource(LONG, key="data.train"), "data.train"),
    ],
)
def test_a_name_that_is_too_long(call, key, supernet):
    with pytest.raises(JointoptError, match=f"{key}: 'a*.*' cannot be looked up: File name too long"):
        call(supernet)


def test_a_quality_that_is_no_function(supernet):
    with pytest.raises(JointoptError, match="quality: found 'accuracy'; allowed: a function of a model"):
        jointopt.search(supernet, quality="accuracy", evaluations=1)


def test_a_rounding_beside_steps(supernet):
    with pytest.raises(JointoptError, match="found rounding 'descent' and steps 2; allowed: one of them"):
        jointopt.finish(supernet, SPACE.largest, labelled(), rounding="descent", steps=2)


def test_a_pruned_normalization():
    model = make("bert")
    prune.l1_unstructured(model.bert.embeddings.LayerNorm, "weight", 0.5)
    with pytest.raises(JointoptError, match=r"bert.embeddings.LayerNorm.weight is computed from others.*prune.remove"):
        Supernet(model, SPACE)


def test_a_pooling_that_hands_each_channel_on_twice():
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(64, 64, 64, 128), global_pool="catavgmax")
    with pytest.raises(JointoptError, match="global_pool 'catavgmax' hands each channel on twice"):
        SearchSpace.for_model(model, schemes=["W8A8"])


def test_a_number_beyond_all_others(supernet):
    with pytest.raises(JointoptError, match="quality returned a number beyond all floats for 'quality'; allowed: less"):
        jointopt.search(supernet, quality=lambda model: 10**400, evaluations=1)


def test_a_hook_that_no_export_holds():
    model = make("bert")
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda module, given: None)
    with pytest.warns(UserWarning, match=r"bert.encoder.layer.1 has a forward hook, .* no part of an export"):
        Supernet(model, SPACE)
