"""ElasticTrainer: what transformers' Trainer does, done to a super-network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, EarlyStoppingCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import jointopt
from jointopt import ElasticTrainer, JointoptError, Recipe, SearchSpace, Supernet
from jointopt.training.distillation import teacher_logits
from jointopt.training.sampling import Sandwich
from tests.elastic_trainers import arguments, assert_trained_alike, data, trainer, weights
from tests.test_training import labelled
from tests.zoo import batches, logits, make


def test_what_is_trained_can_be_searched_and_the_model_given_is_untouched(tmp_path):
    model = make("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = trainer(tmp_path, model)
    made.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(made).items())
    images = torch.stack([each["pixel_values"] for each in data(8, 2)])
    study = jointopt.search(made.supernet, lambda m: float(logits(m, {"pixel_values": images}).std()), evaluations=4)
    assert len(study) == 4


def test_evaluation_logs_the_smallest_the_middle_and_the_largest(tmp_path):
    made = trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    made.train()
    logged = {name for record in made.state.log_history for name in record}
    assert {"loss", "eval_loss", "eval_smallest_loss", "eval_middle_loss"} <= logged
    found = made.evaluate()
    assert found["eval_loss"] != found["eval_smallest_loss"]


def test_accumulated_batches_train_the_same_sub_networks_as_one_large_batch(tmp_path):
    recipe = Recipe(Sandwich(1), seed=3)
    whole = trainer(tmp_path / "a", recipe=recipe, per_device_train_batch_size=8, max_steps=3)
    parts = trainer(
        tmp_path / "b", recipe=recipe, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3
    )
    for each in (whole, parts):
        each.train()
    assert_trained_alike(weights(parts), weights(whole))


def test_bf16_and_gradient_checkpointing_train_and_leave_a_float32_super_network(tmp_path):
    made = trainer(tmp_path, bf16=True, gradient_checkpointing=True)
    made.train()
    losses = [record["loss"] for record in made.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]
    batch = {"pixel_values": torch.stack([each["pixel_values"] for each in data(4)])}
    with made.supernet.active(made.supernet.space.largest) as view:
        with torch.no_grad():
            hidden = view.vit(**batch).last_hidden_state
        assert hidden.dtype == torch.float32
        # Half of the precision would show in a sum over rows that are the same but for their order.
        torch.testing.assert_close(
            logits(view, batch), logits(made.supernet.extract(made.supernet.space.largest), batch)
        )


def test_a_timm_model_checkpoints_by_its_own_method_and_not_by_the_trainer_s(tmp_path):
    rows = [{"x": row["pixel_values"], "labels": row["labels"]} for row in data()]
    found = []
    for on in (False, True):
        model = make("timm_vit")
        model.set_grad_checkpointing(on)
        made = ElasticTrainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows)
        made.train()
        found.append(weights(made))
    assert all(torch.equal(found[1][name], each) for name, each in found[0].items())
    asked = arguments(tmp_path, gradient_checkpointing=True)
    with pytest.raises(JointoptError, match="no activation_checkpointing_enable; allowed: False, and its own set_grad"):
        ElasticTrainer(model=make("timm_vit"), args=asked, train_dataset=rows)


def test_gradient_checkpointing_of_a_model_that_has_none_is_refused_at_start(tmp_path):
    with pytest.raises(JointoptError, match="True, which a ResNetForImageClassification does not support; allowed: F"):
        trainer(tmp_path, make("resnet"), gradient_checkpointing=True)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    plain, checkpointed = (trainer(tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    for each in (plain, checkpointed):
        each.train()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama_tied", "resnet", "timm_vit"])
def test_every_family_trains(name, tmp_path):

    batch = labelled(name)[0]
    rows = [{key: value[at] for key, value in batch.items()} for at in range(6)]
    made = ElasticTrainer(model=make(name), args=arguments(tmp_path, max_steps=2), train_dataset=rows)
    made.train()
    assert made.supernet.calibrated and made.supernet.trained


def test_training_leaves_a_model_that_generates_with_its_cache(tmp_path):

    rows = [{key: value[at] for key, value in labelled("llama_tied")[0].items()} for at in range(6)]
    kept = arguments(tmp_path, max_steps=1, gradient_checkpointing=True)
    made = ElasticTrainer(model=make("llama_tied"), args=kept, train_dataset=rows)
    made.train()
    exported = made.supernet.extract(made.supernet.space.largest)
    assert exported.config.use_cache
    assert not any(getattr(module, "gradient_checkpointing", False) for module in exported.modules())
    assert not any(module._forward_hooks for module in exported.modules())


class Once(IterableDataset):
    def __init__(self, rows: list[dict]):
        self.iterator = iter(rows)

    def __iter__(self):
        return self.iterator


def test_data_that_can_be_gone_through_once_is_refused_before_it_is_read(tmp_path):
    for name in ("train_dataset", "eval_dataset"):
        given = {"train_dataset": data(), name: Once(data(4))}
        with pytest.raises(JointoptError, match=f"^{name}: found a Once that can be gone through once; allowed: "):
            ElasticTrainer(model=make("vit"), args=arguments(tmp_path), **given)
        assert len(list(given[name])) == 4
    with pytest.raises(JointoptError, match="^eval_dataset: found a Once"):
        trainer(tmp_path).evaluate(Once(data(4)))


def packed(folder: Path, **options) -> tuple[ElasticTrainer, list[dict]]:
    """Of a decoder, its samples of several lengths in one row a batch, without padding."""
    rows = [{"input_ids": list(range(4, 4 + size)), "labels": list(range(4, 4 + size))} for size in (5, 9, 7, 12)]
    made = ElasticTrainer(
        model=make("llama_tied"), args=arguments(folder, learning_rate=0.0, weight_decay=0.0, **options),
        train_dataset=rows, eval_dataset=rows, data_collator=DataCollatorWithFlattening(),
    )  # fmt: skip
    return made, rows


def test_packed_samples_do_not_see_each_other_before_nor_after_training(tmp_path):
    made, rows = packed(tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=1)
    assert made.supernet.model.config.use_cache
    before = made.evaluate()
    made.train()
    made.train()
    after = made.evaluate()
    model, tokens, total = made.supernet.model.eval(), 0, 0.0
    for row in rows:
        count = len(row["labels"]) - 1
        total += model(**{key: torch.tensor([ids]) for key, ids in row.items()}).loss.item() * count
        tokens += count
    alone = total / tokens
    assert before["eval_loss"] == pytest.approx(alone, rel=1e-5)
    for name in ("eval_loss", "eval_smallest_loss", "eval_middle_loss"):
        assert after[name] == pytest.approx(before[name], rel=1e-5)
    assert made.supernet.model.config.use_cache


class Nothing:
    """Samples no sub-network, so that the largest alone is trained."""

    def genomes(self, space, progress, seed):
        return []


def test_packed_samples_do_not_see_each_other_in_a_loop_of_one_s_own(tmp_path):
    made, rows = packed(tmp_path)
    supernet, recipe = made.supernet, Recipe(Nothing(), distillation=None)
    found = jointopt.elastic_loss(supernet, DataCollatorWithFlattening()(rows), 0, recipe)
    alone = [jointopt.elastic_loss(supernet, {k: torch.tensor([v]) for k, v in row.items()}, 0, recipe) for row in rows]
    counts = [len(row["labels"]) - 1 for row in rows]
    expected = sum(float(each.detach()) * n for each, n in zip(alone, counts, strict=True)) / sum(counts)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_given_teacher_sees_packed_samples_one_by_one_too():
    teacher = make("llama_tied", seed=1)
    rows = [{"input_ids": list(range(4, 4 + size))} for size in (5, 9)]
    together = DataCollatorWithFlattening()([{**row, "labels": row["input_ids"]} for row in rows])
    found = teacher_logits(teacher, {name: each for name, each in together.items() if name != "labels"})
    alone = [teacher_logits(teacher, {"input_ids": torch.tensor([row["input_ids"]])})[0] for row in rows]
    torch.testing.assert_close(found[0], torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama_tied", "vit"])
def test_a_trainer_leaves_the_config_as_it_was(name, tmp_path):

    rows = [{key: value[at] for key, value in labelled(name)[0].items()} for at in range(6)]
    model = make(name)
    made = ElasticTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows)
    assert made.supernet.model.config.to_dict() == model.config.to_dict()
    made.train()
    assert made.supernet.model.config.to_dict() == model.config.to_dict()


def test_channels_are_sorted_again_during_training(tmp_path):
    model = make("vit")
    made = ElasticTrainer(
        model=model, args=arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=data(), sort_every=2
    )
    calls = []
    sort = made.supernet.sort_again
    made.supernet.sort_again = lambda *given: (calls.append(made.state.global_step), sort(*given))
    made.train()
    assert calls == [2, 4]


def test_an_optimizer_that_cannot_be_sorted_is_refused_after_its_first_step_and_not_after_an_hour(tmp_path):
    args = arguments(tmp_path, optim="adafactor")
    made = ElasticTrainer(model=make("vit"), args=args, train_dataset=data(), sort_every=5)
    with pytest.raises(JointoptError, match="sort_every: Adafactor keeps .* which cannot be sorted"):
        made.train()
    assert made.state.global_step == 1


class OnTwoGpus(TrainingArguments):
    """As a script that is started by plain `python` on such a machine sees it."""

    n_gpu = 2  # type: ignore[assignment]


def test_what_cannot_be_trained_is_refused_at_the_start(tmp_path):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model))
    unlabelled = [{"pixel_values": each["pixel_values"]} for each in data()]
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make("vit"), peft.LoraConfig(target_modules=["q_proj"]))
    other = SearchSpace.for_model(make("resnet"), schemes=["none"])
    for match, options in {
        "train_dataset: found pixel_values; allowed: one of them labels": {"model": model, "train_dataset": unlabelled},
        "model: found a super-network": {"model": supernet},
        r"model: found it in a PeftModel; allowed: the model itself \(merge_and_unload": {"model": adapted},
        "the vit model has no such place": {"model": model, "space": other},
        "given beside a model": {"model": model, "supernet": supernet},
        "model: found None; allowed: a torch.nn.Module": {},
        "supernet: found a ViTForImageClassification; allowed: a Supernet": {"supernet": model},
        "eval_dataset: found pixel_values; allowed: one of them labels": {"model": model, "eval_dataset": unlabelled},
        "eval_dataset: own: found no sample": {"model": model, "eval_dataset": {"own": []}},
        "train_dataset: found none, and so nothing to calibrate with": {"model": model, "train_dataset": None},
        "sort_every: found -1; allowed: a whole number from 1": {"model": model, "sort_every": -1},
    }.items():
        with pytest.raises(JointoptError, match=match):
            ElasticTrainer(args=arguments(tmp_path), **{"train_dataset": data(), **options})
    with pytest.raises(JointoptError, match="fp16"):
        trainer(tmp_path, fp16=True)
    with pytest.raises(JointoptError, match="fp16_full_eval, which leave the super-network in 16 bits"):
        trainer(tmp_path, bf16_full_eval=True)
    with pytest.raises(JointoptError, match="fsdp or deepspeed, which keep parts of the weights"):
        sharded = arguments(tmp_path)
        sharded.fsdp = "full_shard"
        ElasticTrainer(model=model, args=sharded, train_dataset=data())
    with pytest.raises(JointoptError, match="2 GPUs in one process, over .* DataParallel; allowed: one"):
        ElasticTrainer(model=model, args=OnTwoGpus(tmp_path / "two", report_to=[]), train_dataset=data())
    with pytest.raises(JointoptError, match="torch_compile, which compiles blocks anew for each width"):
        trainer(tmp_path, torch_compile=True)
    with pytest.raises(JointoptError, match="use_reentrant True; allowed: False"):
        trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(JointoptError, match="label_smoothing_factor 0.1 beside a loss that is not of one class"):
        trainer(tmp_path, recipe=Recipe(loss=lambda logits, batch: logits.mean()), label_smoothing_factor=0.1)
    with pytest.raises(JointoptError, match="model_init: found one; allowed: model=, or supernet="):
        ElasticTrainer(args=arguments(tmp_path), train_dataset=data(), model_init=lambda: model)
    with pytest.raises(JointoptError, match="hyperparameter_search: makes models of its own"):
        trainer(tmp_path).hyperparameter_search()
    with pytest.raises(JointoptError, match="compute_loss_func"):
        ElasticTrainer(model=model, args=arguments(tmp_path), train_dataset=data(), compute_loss_func=print)


def test_a_subclass_whose_loss_has_no_sub_network_in_it_is_refused_at_its_first_step(tmp_path):
    class Weighted(ElasticTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            return model(**inputs).loss

    class Doubled(ElasticTrainer):
        def compute_loss(self, *given, **options):
            return 2 * super().compute_loss(*given, **options)

    with pytest.raises(JointoptError, match=r"Weighted.compute_loss takes the place of ElasticTrainer's"):
        Weighted(model=make("vit"), args=arguments(tmp_path), train_dataset=data()).train()
    assert Doubled(model=make("vit"), args=arguments(tmp_path), train_dataset=data()).train().global_step == 6


def test_an_evaluation_that_scores_nothing_is_refused_and_a_prediction_needs_no_labels(tmp_path):
    made = trainer(tmp_path)
    unlabelled = [{"pixel_values": each["pixel_values"]} for each in data(4)]
    for given in (unlabelled, []):
        with pytest.raises(JointoptError, match="evaluate: found no sample with labels; allowed: one or more"):
            made.evaluate(given)
    assert made.predict(unlabelled).predictions.shape == (4, 5)


def test_accumulated_batches_weigh_by_the_tokens_that_count(tmp_path):
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in batches("llama_tied", 1, 8)[0]["input_ids"]]
    for row in rows[:4]:
        row["labels"][:14] = -100
    found = []
    for size, parts in ((8, 1), (4, 2)):
        kept = arguments(
            tmp_path / str(size), max_steps=1, learning_rate=0.1, optim="sgd", per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, max_grad_norm=0, lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        model = make("llama_tied")
        space = SearchSpace.for_model(model, schemes=["none"])
        made = ElasticTrainer(
            model=model, space=space, args=kept, train_dataset=rows, recipe=Recipe(distillation=None),
            calibration=[{"input_ids": rows[0]["input_ids"][None]}],
        )  # fmt: skip
        made.train()
        found.append(weights(made))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_step_in_which_no_label_counts_leaves_the_weights_finite(tmp_path):
    ids = batches("llama_tied", 1, 4)[0]["input_ids"]
    rows = [{"input_ids": row, "labels": torch.full_like(row, -100) if at % 2 else row} for at, row in enumerate(ids)]
    made = ElasticTrainer(
        model=make("llama_tied"), args=arguments(tmp_path, max_steps=4, per_device_train_batch_size=1),
        train_dataset=rows,
    )  # fmt: skip
    made.train()
    assert all(torch.isfinite(tensor).all() for tensor in weights(made).values())


def test_smoothed_labels_are_those_of_the_trainer(tmp_path):
    made = trainer(tmp_path, label_smoothing_factor=0.2)
    batch = made.data_collator(data(8, 1))
    output = make("vit")(**{name: value for name, value in batch.items() if name != "labels"})
    expected = LabelSmoother(0.2)(output, batch["labels"])
    assert made.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    plain = trainer(tmp_path)
    for each in (made, plain):
        each.train()
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (made, plain)]
    assert losses[0] != losses[1]


def test_an_optimizer_of_the_model_that_was_copied_is_refused_and_one_of_the_super_network_trains(tmp_path):
    model = make("vit")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(JointoptError, match="optimizers: found one of other parameters than the super-network's"):
        ElasticTrainer(model=model, args=arguments(tmp_path), train_dataset=data(), optimizers=(optimizer, None))
    supernet = Supernet(model, SearchSpace.for_model(model))
    supernet.calibrate([{"pixel_values": torch.stack([each["pixel_values"] for each in data()])}])
    before = {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}
    own = (torch.optim.AdamW(supernet.model.parameters()), None)
    made = ElasticTrainer(supernet=supernet, args=arguments(tmp_path), train_dataset=data(), optimizers=own)
    made.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(made).items())


class Counted(torch.utils.data.Dataset):
    """A dataset that knows how long it is, and does not stop by an IndexError."""

    def __init__(self, rows: list[dict]):
        self.rows = dict(enumerate(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict:
        return self.rows[at]


def test_a_dataset_is_read_as_far_as_its_length_says(tmp_path):
    model = make("vit")
    made = ElasticTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=Counted(data()))
    made.train()
    assert made.supernet.calibrated


def test_losses_logged_while_number_formats_are_trained_are_those_of_the_last_weights(tmp_path):
    made = trainer(tmp_path, recipe=Recipe(precision_from=0.0), eval_strategy="steps", eval_steps=1, learning_rate=0.05)
    made.train()
    logged = [entry for entry in made.state.log_history if "eval_smallest_loss" in entry][-1]
    assert logged["eval_smallest_loss"] == pytest.approx(made.evaluate()["eval_smallest_loss"], rel=1e-5)


def test_a_resnet_is_evaluated_with_statistics_of_the_sub_network(tmp_path):
    made = trainer(tmp_path, make("resnet"), max_steps=2)
    made.train()
    found = made.evaluate()["eval_smallest_loss"]
    plan = made.supernet.plan(made.supernet.space.smallest)
    with made.supernet.active(made.supernet.space.smallest) as small, torch.no_grad():
        rows = data(8, 1)
        shown = logits(small, {"pixel_values": torch.stack([each["pixel_values"] for each in rows])})
    unquantized = not plan.schemes
    expected = float(torch.nn.functional.cross_entropy(shown, torch.tensor([each["labels"] for each in rows])))
    assert found == pytest.approx(expected, rel=1e-4 if unquantized else 0.1)


def test_early_stopping_sees_the_smallest_sub_network(tmp_path):
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "smallest_loss"}
    made = trainer(tmp_path, callbacks=[stop], **often, **best)
    made.train()
    assert made.state.global_step == 2


def test_labels_may_come_from_the_collator(tmp_path):
    rows = [{"input_ids": ids} for ids in batches("llama_tied", 1, 8)[0]["input_ids"]]

    def collate(samples: list[dict]) -> dict:
        ids = torch.stack([each["input_ids"] for each in samples])
        return {"input_ids": ids, "labels": ids.clone()}

    made = ElasticTrainer(
        model=make("llama_tied"), args=arguments(tmp_path, max_steps=1), train_dataset=rows, data_collator=collate
    )
    made.train()
    assert made.state.global_step == 1
