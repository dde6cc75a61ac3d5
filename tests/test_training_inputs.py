"""What super-network training takes: labels, losses, recipes and models; and what it refuses before any step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForTokenClassification

import jointopt
from jointopt import Distillation, ElasticTrainer, JointoptError, Recipe, SearchSpace, Supernet
from jointopt.training import loop
from jointopt.training.distillation import soft_labels
from jointopt.training.recipe import TaskLoss
from jointopt.training.sampling import Attentive, Progressive, Sandwich, Uniform, step_seed
from tests.elastic_trainers import arguments
from tests.test_training import calibrated, gradients, labelled, still
from tests.zoo import batches, logits, make


class Narrow(nn.Module):
    """A teacher of three classes that says so only when it is run."""

    num_labels = 5

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.flatten(1)[:, :3]


class Other(Narrow):
    """A teacher of other inputs."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return input_ids


def test_labels_may_be_probabilities_of_the_classes():
    logits = torch.randn(6, 5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(TaskLoss()(logits, {"labels": one_hot}), TaskLoss()(logits, {"labels": labels}))


@pytest.mark.parametrize(
    "given",
    [torch.arange(6, dtype=torch.int32) % 5, np.arange(6) % 5, [0, 1, 2, 3, 4, 0]],
    ids=["int32", "array", "list"],
)
def test_labels_may_be_whole_numbers_of_any_kind(given):
    supernet = calibrated("vit")
    expected = jointopt.elastic_loss(supernet, labelled("vit")[0], 0)
    assert jointopt.elastic_loss(supernet, {**labelled("vit")[0], "labels": given}, 0) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.arange(6), "labels: found 5; allowed: 0 to 4, and -100"),
        (torch.arange(6) - 1, "labels: found -1; allowed: 0 to 4"),
        (torch.arange(5), r"labels are int64 \[5\], logits \[6, 5\]; allowed: classes"),
        (torch.zeros(6, 1, dtype=torch.long), r"labels are int64 \[6, 1\]"),
        ("cat", "labels: found 'cat'; allowed: a tensor, or an array of numbers"),
        (None, "a batch has no 'labels'"),
    ],
)
def test_labels_that_are_no_classes_of_the_samples_are_refused(given, said):
    with pytest.raises(JointoptError, match=f"train: .*{said}"):
        jointopt.elastic_loss(calibrated("vit"), {**labelled("vit")[0], "labels": given}, 0)


def test_labels_of_which_none_counts_give_no_gradient():
    supernet = calibrated("llama_tied", schemes=["none"])
    batch = {**labelled("llama_tied")[0], "labels": torch.full((6, 16), -100)}
    loss = jointopt.elastic_loss(supernet, batch, 0, Recipe(distillation=None))
    loss.backward()
    assert loss == 0 and not any(each.any() for each in gradients(supernet).values())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            lambda logits, batch: logits.mean(1),
            r"loss: returned a tensor of shape \[6\]; allowed: a tensor of one number",
        ),
        (lambda logits, batch: 1.0, "loss: returned 1.0"),
        (lambda logits, batch: logits.detach().mean(), "loss: returned a number that no gradient can go back from"),
    ],
)
def test_a_loss_that_is_no_number_of_the_logits_is_refused(loss, said):
    with pytest.raises(JointoptError, match=said):
        jointopt.elastic_loss(calibrated("vit"), labelled("vit")[0], 0, Recipe(loss=loss))


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: Recipe(5), "sampling: found 5; allowed: sandwich"),
        (lambda: Recipe(Sandwich), "sampling: found <class"),
        (lambda: Recipe(distillation=True), "distillation: found True; allowed: a Distillation, or None"),
        (lambda: Recipe(precision_from=float("nan")), "precision_from: found nan; allowed: from 0 to 1"),
        (lambda: Recipe(loss="mse"), "loss: found 'mse'; allowed: a function"),
        (lambda: Recipe(seed=-1), "recipe: seed: found -1; allowed: a whole number from 0"),
        (lambda: Distillation(temperature=float("inf")), "temperature: found inf; allowed: above 0"),
        (lambda: Distillation(hidden=float("nan")), "hidden: found nan; allowed: 0 or more"),
        (lambda: Distillation(teacher="bert"), "teacher: found a str; allowed: a torch.nn.Module"),
        (lambda: Sandwich(-1), "sandwich: count: found -1; allowed: a whole number from 0"),
        (lambda: Uniform(1.5), "random: count: found 1.5"),
        (lambda: Progressive(width_from=2), "progressive: width_from: found 2; allowed: from 0 to 1"),
        (lambda: Attentive(mutation=-1), "attentive: mutation: found -1; allowed: from 0 to 1"),
        (lambda: Attentive(region=3), "attentive: region: found 3; allowed: a function"),
        (lambda: Attentive(front=np.zeros((0, 20))), r"attentive: front: found shape \(0, 20\)"),
    ],
)
def test_a_recipe_s_numbers_and_kinds_are_checked_where_it_is_made(make_it, said):
    with pytest.raises(JointoptError, match=said):
        make_it()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": -1}, "step: found -1; allowed: a whole number from 0"),
        ({"steps": 0}, "steps: found 0; allowed: a whole number from 1"),
        ({"recipe": "sandwich"}, "recipe: found 'sandwich'; allowed: a Recipe"),
        ({"recipe": Recipe(Attentive(front=np.zeros((1, 3), int)))}, r"genome: found shape \(1, 3\)"),
        ({"recipe": Recipe(Attentive(region=lambda genomes: 0))}, r"region: returned shape \(\) for 128 genomes"),
        ({"recipe": Recipe(distillation=Distillation(teacher=nn.Linear(2, 5)))}, "teacher: num_labels is None"),
        (
            {"recipe": Recipe(distillation=Distillation(teacher=Narrow()))},
            r"teacher: its logits are \[6, 3\], .* \[6, 5\]",
        ),
        ({"recipe": Recipe(distillation=Distillation(teacher=Other()))}, "teacher: does not take pixel_values"),
    ],
)
def test_what_a_step_cannot_be_made_of_is_refused(options, said):
    with pytest.raises(JointoptError, match=said):
        jointopt.elastic_loss(calibrated("vit"), labelled("vit")[0], **{"step": 0, **options})


def test_labels_of_the_tokens_themselves_are_not_taken_for_the_next_ones():
    model = BertForTokenClassification(make("bert").config).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    supernet.calibrate(batches("bert"))
    batch = {**batches("bert")[0], "labels": torch.arange(96).reshape(6, 16) % 3}
    with pytest.raises(JointoptError, match=r"loss: found a BertForTokenClassification.*Recipe\(loss="):
        jointopt.elastic_loss(supernet, batch, 0)

    def loss(logits, batch):
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    still(supernet.model)
    found = jointopt.elastic_loss(supernet, batch, 0, Recipe(Uniform(0), loss=loss))
    torch.testing.assert_close(found, model(**batch).loss)


def test_a_single_output_is_not_distilled():
    model = make("bert")
    model.classifier, model.config.num_labels = nn.Linear(128, 1), 1
    model.config.problem_type = "single_label_classification"  # of which one output is no distribution
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    supernet.calibrate(batches("bert"))
    batch = {**batches("bert")[0], "labels": torch.rand(6)}
    loss = lambda logits, batch: (logits[:, 0] - batch["labels"]).square().mean()  # noqa: E731
    with pytest.raises(JointoptError, match=r"logits of a single output.*Recipe\(distillation=None\)"):
        jointopt.elastic_loss(supernet, batch, 0, Recipe(loss=loss))
    assert jointopt.elastic_loss(supernet, batch, 0, Recipe(loss=loss, distillation=None)) > 0
    supernet.calibrate(batches("bert"))
    with pytest.raises(JointoptError, match=r"finish: steps: found logits of a single output.*rounding, or"):
        jointopt.finish(supernet, supernet.space.largest, batches("bert"), steps=1)


@dataclass(frozen=True)
class Odd:
    """A sampling strategy of one's own that gives what is no list of genomes."""

    given: object

    def genomes(self, space, progress, seed):
        return self.given


@pytest.mark.parametrize("given", [None, np.zeros(3, int), np.zeros((1, 2, 3), int)])
def test_what_a_sampling_of_one_s_own_gives_in_place_of_genomes_is_named(given):
    with pytest.raises(JointoptError, match="(?s)sampling: found .* in place of genomes; allowed: a list of them"):
        jointopt.elastic_loss(calibrated("vit"), labelled("vit")[0], 0, Recipe(Odd(given)))


class Growing:
    """A sampling strategy of one's own that changes as training goes on."""

    counts_steps = True

    def genomes(self, space, progress, seed):
        return [space.smallest if progress < 0.5 else space.largest]


def test_a_sampling_of_one_s_own_that_counts_steps_is_not_left_at_the_first():
    supernet, batch = calibrated("vit"), labelled("vit")[0]
    with pytest.raises(JointoptError, match="steps: found none; this recipe counts by their number"):
        jointopt.elastic_loss(supernet, batch, 0, Recipe(Growing()))
    assert jointopt.elastic_loss(supernet, batch, 0, Recipe(Growing()), steps=2) > 0
    assert jointopt.elastic_loss(supernet, batch, 0, Recipe(Odd([supernet.space.smallest]))) > 0


def test_formats_without_ranges_are_refused_before_the_step_that_needs_them(tmp_path):
    trained = calibrated("vit", schemes=["W8A8_STATIC"])
    jointopt.train_supernet(trained, labelled("vit"), 1)
    trained.save(tmp_path / "supernet.safetensors")
    restored = Supernet(make("vit"), trained.space)
    restored.load(tmp_path / "supernet.safetensors")
    with pytest.raises(JointoptError, match="W8A8_STATIC needs ranges of activations; call calibrate"):
        jointopt.train_supernet(restored, labelled("vit"), 4, recipe=Recipe(precision_from=0.75))
    with pytest.raises(JointoptError, match="W8A8_STATIC needs ranges of activations; call calibrate"):
        jointopt.elastic_loss(restored, labelled("vit")[0], 0, Recipe(precision_from=0.75), steps=4)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_where_gradients_are_off_trains_all_the_same(off):
    one, two = calibrated("vit"), calibrated("vit")
    data = labelled("vit")
    jointopt.train_supernet(one, data, 2)
    with off():
        jointopt.train_supernet(two, data, 2)
        assert not torch.is_grad_enabled()
    for mine, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_frozen_model_is_not_trained():
    supernet = calibrated("vit")
    supernet.model.requires_grad_(False)
    with pytest.raises(JointoptError, match="no parameter of the model needs a gradient"):
        jointopt.train_supernet(supernet, labelled("vit"), 1)


def test_what_cannot_be_trained_is_refused_before_any_step():
    supernet = calibrated("vit")
    fresh = Supernet(make("vit"), supernet.space)
    batch = labelled("vit")[0]
    for match, call in {
        r"calibrate\(batches\) first": lambda: jointopt.elastic_loss(fresh, batch, 0),
        r"no 'labels'; found pixel_values": lambda: jointopt.elastic_loss(supernet, batches("vit")[0], 0),
        r"sampling: found 'sandwitch'; did you mean 'sandwich'": lambda: Recipe("sandwitch"),
        r"precision_from: found 2": lambda: Recipe(precision_from=2),
        r"temperature: found 0; allowed: above 0": lambda: Distillation(temperature=0),
        r"neither a front nor a region": lambda: jointopt.elastic_loss(supernet, batch, 0, Recipe("attentive")),
        r"steps: found none": lambda: jointopt.elastic_loss(supernet, batch, 0, Recipe("progressive")),
        r"step: found 5 of 5": lambda: jointopt.elastic_loss(supernet, batch, 5, steps=5),
        r"teacher: vocab_size is 96, the model's None": lambda: jointopt.elastic_loss(
            supernet, batch, 0, Recipe(distillation=Distillation(teacher=make("bert")))
        ),
        r"attention, of which a resnet has none": lambda: Distillation(attention=1.0).check(
            calibrated("resnet").family, calibrated("resnet").space, make("resnet")
        ),
        r"no number format": lambda: Recipe(precision_from=0.5).check(calibrated("vit", schemes=["none"])),
        r"labels are float32 \[6\], .*Recipe\(loss=": lambda: jointopt.elastic_loss(
            supernet, {**batch, "labels": torch.rand(6)}, 0
        ),
        r"found batches in a generator": lambda: jointopt.train_supernet(supernet, (each for each in [batch]), 1),
        r"found batches in a function that takes no epoch": lambda: jointopt.train_supernet(
            supernet, lambda: [batch], 1
        ),
        r"found batches in a dict": lambda: jointopt.train_supernet(supernet, batch, 1),
        r"found a batch of type tuple; allowed: dicts": lambda: jointopt.elastic_loss(supernet, (batch,), 0),
        r"found no batch": lambda: jointopt.train_supernet(supernet, [], 1),
    }.items():
        with pytest.raises(JointoptError, match=match):
            call()


def test_what_accelerate_prepared_for_bf16_is_searched_and_exported_in_float32(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = make("bert")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(batches("bert"))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        prepared = accelerator.prepare(supernet.model)
        accelerator.backward(jointopt.elastic_loss(supernet, labelled("bert")[0], 0))
        assert prepared is supernet.model
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    supernet.calibrate(batches("bert"))
    with supernet.active(supernet.space.largest) as view:
        torch.testing.assert_close(
            logits(view, batches("bert")[0]), logits(model, batches("bert")[0]), rtol=0, atol=1e-5
        )
    verification = jointopt.verify(jointopt.export(supernet, supernet.space.largest, tmp_path / "export"))
    assert verification.ok, verification.differences


def test_a_checkpoint_that_cannot_be_read_or_written_is_refused_in_one_line(tmp_path):
    supernet = calibrated("vit")
    (tmp_path / "cut.safetensors").write_bytes(b"no tensors")
    for path, said in (("cut.safetensors", "cannot be read"), ("nowhere/it.safetensors", "does not exist")):
        with pytest.raises(JointoptError, match=said):
            jointopt.train_supernet(supernet, labelled("vit"), 2, checkpoint=tmp_path / path)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"steps": 0}, "train: steps: found 0"), ({"sort_every": 0}, "sort_every: found 0"),
     ({"learning_rate": float("nan")}, "learning_rate: found nan; allowed: above 0")],
)  # fmt: skip
def test_numbers_that_train_nothing_are_refused(options, said):
    with pytest.raises(JointoptError, match=said):
        jointopt.train_supernet(calibrated("vit"), labelled("vit"), **{"steps": 2, **options})


def test_an_optimizer_of_another_model_is_not_sorted():
    other = torch.optim.AdamW(make("vit").parameters())
    with pytest.raises(JointoptError, match="sort_again: found an optimizer of other parameters"):
        calibrated("vit").sort_again(batches("vit"), other)


def test_an_optimizer_whose_state_does_not_follow_channels_is_not_sorted():
    supernet = calibrated("vit")
    optimizer = torch.optim.Adafactor(supernet.model.parameters())
    jointopt.elastic_loss(supernet, labelled("vit")[0], 0).backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}
    with pytest.raises(JointoptError, match="sort_every: Adafactor keeps row_var"):
        supernet.sort_again(batches("vit"), optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.model.state_dict().items())


@pytest.mark.parametrize("labels", [torch.tensor([[1.0, 0, 1, 0, 1]]).repeat(6, 1), torch.zeros(6, 5)])
def test_several_classes_at_once_are_not_taken_for_probabilities(labels):
    with pytest.raises(JointoptError, match=r"float32 \[6, 5\] of which a sample's do not add up to 1.*Recipe\(loss="):
        jointopt.elastic_loss(calibrated("vit"), {**labelled("vit")[0], "labels": labels}, 0)


def test_float16_autocast_is_refused_and_bfloat16_is_not():
    supernet = calibrated("vit")
    with torch.autocast("cpu", torch.float16), pytest.raises(JointoptError, match="found float16 autocast"):
        jointopt.elastic_loss(supernet, labelled("vit")[0], 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(jointopt.elastic_loss(supernet, labelled("vit")[0], 0))


def test_a_recipe_may_be_made_anew_at_each_step():
    supernet = calibrated("vit")
    for step in range(2):
        recipe = Recipe(Attentive(front=supernet.space.sample(3, seed=0)))
        assert torch.isfinite(jointopt.elastic_loss(supernet, labelled("vit")[0], step, recipe))


def test_where_no_token_has_a_label_nothing_is_distilled():
    supernet, batch = calibrated("llama_tied"), batches("llama_tied")[0]
    still(supernet.model)
    answers = {**batch, "labels": batch["input_ids"].clone()}
    answers["labels"][:, :-3] = -100
    sampling = Uniform(1)
    (genome,) = sampling.genomes(supernet.space, 0.0, step_seed(0, 0))
    found = jointopt.elastic_loss(supernet, answers, 0, Recipe(sampling))
    whole = supernet.model(**answers)
    student = supernet.training_view(genome, False)(**batch).logits
    learned = soft_labels(student[:, -4:-1], whole.logits[:, -4:-1])
    torch.testing.assert_close(found, whole.loss + learned)


def test_of_prompts_too_a_step_of_small_batches_is_that_of_the_whole_one(tmp_path):
    ids = batches("llama_tied", 1, 8)[0]["input_ids"]
    rows = []
    for at, each in enumerate(ids):
        labels = each.clone()
        labels[: 2 + at] = -100
        rows.append({"input_ids": each, "labels": labels})
    found = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = make("llama_tied")
        still(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        args = arguments(tmp_path, max_steps=2, optim="sgd", learning_rate=0.1, **options)
        made = ElasticTrainer(model=model, args=args, train_dataset=rows)
        made.train()
        found.append(made.supernet.model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_training_in_which_no_label_counts_says_so(tmp_path):
    (batch,) = batches("llama_tied", 1, 4)
    ignored = torch.full_like(batch["input_ids"], -100)
    ignored[:, 0] = 3  # which no token comes before
    supernet = calibrated("llama_tied")
    with pytest.warns(UserWarning, match="train: in all steps no label counted, each was -100: nothing was learned"):
        assert jointopt.train_supernet(supernet, [{**batch, "labels": ignored}], 2) == [0.0, 0.0]
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(batch["input_ids"], ignored, strict=True)]
    made = ElasticTrainer(
        model=make("llama_tied"), args=arguments(tmp_path, max_steps=2), train_dataset=rows, eval_dataset=rows
    )
    with pytest.warns(UserWarning, match="train: in all steps no label counted"):
        made.train()
    with pytest.raises(JointoptError, match="evaluate: no label counts, each is -100; allowed: some that do"):
        made.evaluate()


def test_batches_that_a_training_has_passed_are_not_made_again():
    made: list[int] = []

    class Lazy(Sequence):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
            made.append(at)
            return labelled("vit")[range(4)[at] % 2]

    numbered = loop.endless("train", lambda epoch: Lazy(), 0, 10)
    next(numbered)
    next(numbered)
    assert made == [2, 3]
    made.clear()
    next(loop.endless("train", Lazy(), 0, 10))
    assert len(made) == 1
