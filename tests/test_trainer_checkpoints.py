"""Checkpoints of an ElasticTrainer: gone on with to the bit; what is damaged or of something else is refused."""

from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import TrainerCallback

from jointopt import ElasticTrainer, JointoptError, Recipe, SearchSpace
from tests.elastic_trainers import arguments, data, trainer, weights
from tests.test_training import labelled
from tests.zoo import make


class _Killed(Exception):
    pass


class _KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise _Killed


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_a_training_that_was_killed_ends_with_the_same_weights_to_the_bit(tmp_path, options):
    recipe = Recipe(precision_from=0.5)
    whole = trainer(tmp_path / "whole", recipe=recipe, **options)
    whole.train()
    killed = trainer(tmp_path / "killed", recipe=recipe, save_strategy="steps", save_steps=2, **options)
    killed.add_callback(_KillAt(5))
    with pytest.raises(_Killed):
        killed.train()
    resumed = trainer(tmp_path / "killed", recipe=recipe, **options)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name


def test_a_checkpoint_of_another_space_is_refused(tmp_path):
    made = trainer(tmp_path, save_strategy="steps", save_steps=3)
    made.train()
    model = make("vit")
    other = ElasticTrainer(
        model=model,
        space=SearchSpace.for_model(model, schemes=["none"], depth=[2, 3]),
        args=arguments(tmp_path),
        train_dataset=data(),
    )
    with pytest.raises(JointoptError, match="another space"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["vit", "deit", "bert"])
@pytest.mark.parametrize("kind", ["plain", "learned ranges", "lora"])
def test_the_best_checkpoint_is_loaded_whole(name, kind, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 5e-3}
    peft = pytest.importorskip("peft")
    targets = ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets) if kind == "lora" else None
    recipe = Recipe(precision_from=0.0, learned_ranges=True) if kind == "learned ranges" else None
    rows = [{key: value[0] for key, value in labelled(name)[0].items()} for _ in range(8)]
    model, seen = make(name), {}

    class SecondIsBest(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **others):
            metrics["eval_loss"] = abs(state.global_step - 2)

        def on_save(self, args, state, control, **others):
            if state.global_step == 2:
                seen.update(weights(made))

    made = ElasticTrainer(
        model=model, space=SearchSpace.for_model(model, schemes=["none", "FP8"]), args=arguments(tmp_path, **options),
        train_dataset=rows, eval_dataset=rows, recipe=recipe, lora=lora, callbacks=[SecondIsBest()],
    )  # fmt: skip
    loaded = {}
    whole = made._load_best_model

    def load_best() -> None:
        whole()
        loaded.update(weights(made))

    made._load_best_model = load_best
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert seen.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in seen.items())


def test_a_model_with_learned_ranges_is_saved_after_training_and_trained_again(tmp_path):
    made = trainer(tmp_path, recipe=Recipe(precision_from=0.0, learned_ranges=True), max_steps=2)
    made.train()
    learned = made.supernet.learned.values.clone()
    made.save_model(str(tmp_path / "saved"))
    assert torch.equal(load_file(tmp_path / "saved" / "added.safetensors")["learned_ranges"], learned)
    made.train()
    assert not torch.equal(made.supernet.learned.values, learned)


def test_a_checkpoint_of_another_recipe_is_refused_in_one_line(tmp_path):
    plain, learned = None, Recipe(precision_from=0.0, learned_ranges=True)
    for number, (one, other) in enumerate([(plain, learned), (learned, plain)]):
        folder = tmp_path / str(number)
        trainer(folder, recipe=one, save_strategy="steps", save_steps=2, max_steps=2).train()
        with pytest.raises(JointoptError, match=r"checkpoint-2' is of another recipe or lora; allowed: the same"):
            trainer(folder, recipe=other, max_steps=4).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@pytest.mark.parametrize("name", ["vit", "timm_vit"])
@pytest.mark.parametrize("missing", [True, False])
def test_weights_that_do_not_all_fit_are_refused_before_one_is_loaded(name, missing, tmp_path):
    image = "x" if name == "timm_vit" else "pixel_values"
    rows = [{image: each["pixel_values"], "labels": each["labels"]} for each in data()]

    def trainer_of(**options) -> ElasticTrainer:
        return ElasticTrainer(model=make(name), args=arguments(tmp_path, **options), train_dataset=rows)

    trainer_of(save_strategy="steps", save_steps=2, max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    last = max(tensors)
    bad = tensors.pop(last)
    save_file(tensors if missing else {**tensors, last: bad[..., :1].contiguous()}, file, metadata={"format": "pt"})
    made = trainer_of(max_steps=4)
    before = weights(made)
    with pytest.raises(JointoptError, match=r"train: the weights in .*checkpoint-2' cannot be read: .* is missing, or"):
        made.train(resume_from_checkpoint=True)
    found = weights(made)
    assert all(torch.equal(found[key], tensor) for key, tensor in before.items())


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path):
    recipe = Recipe(precision_from=0.0, learned_ranges=True)
    trainer(tmp_path, recipe=recipe, save_strategy="steps", save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    for name, content in (
        ("supernet.json", b"["),
        ("supernet.json", b"[1]"),
        ("added.safetensors", b"no tensors"),
        ("added.safetensors", save({"learned_ranges": torch.zeros(1)})),
        ("added.safetensors", save({"other": torch.zeros(1)})),
        ("model.safetensors", b"no tensors"),
    ):
        (folder / name).rename(folder / "kept")
        (folder / name).write_bytes(content)
        made = trainer(tmp_path, recipe=recipe, max_steps=4)
        before = weights(made)
        with pytest.raises(JointoptError, match=r"train: .*checkpoint-2.* cannot be read: .*; allowed: what this"):
            made.train(resume_from_checkpoint=str(folder))
        found = weights(made)
        assert all(torch.equal(found[key], tensor) for key, tensor in before.items())
        (folder / "kept").replace(folder / name)


def test_the_best_checkpoint_is_that_of_the_smallest_sub_network_s_least_loss(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "smallest_loss"}
    made = trainer(tmp_path, learning_rate=3e-2, **often, **best)
    made.train()
    seen = [entry["eval_smallest_loss"] for entry in made.state.log_history if "eval_smallest_loss" in entry]
    assert made.state.best_metric == min(seen) < max(seen)


EPOCHS = {"max_steps": -1, "num_train_epochs": 1.3}
"""Of 6 batches each."""


@pytest.mark.parametrize(
    ("options", "steps"), [({"max_steps": 4}, 4), (EPOCHS, 8), ({**EPOCHS, "gradient_accumulation_steps": 4}, 3)]
)
def test_a_training_that_has_ended_is_taken_up_as_it_ended(tmp_path, options, steps):
    made = trainer(tmp_path, save_strategy="steps", save_steps=steps, **options)
    made.train()
    again = trainer(tmp_path, save_strategy="steps", save_steps=steps, **options)
    assert again.train(resume_from_checkpoint=True).global_step == steps
    assert again.supernet.calibrated
    expected = weights(made)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again).items())


def test_a_training_that_has_ended_goes_on_with_more_epochs(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=8, **EPOCHS).train()
    assert trainer(tmp_path, **{**EPOCHS, "num_train_epochs": 2}).train(resume_from_checkpoint=True).global_step == 12


class _FullDisk(TrainerCallback):
    """After a step no file may grow beyond this."""

    def __init__(self, step: int, limit: int):
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("limit", "said"), [(300_000, "File too large"), (2_000_000, "as it does on a full disk")])
def test_a_checkpoint_that_cannot_be_written_whole_is_named_and_the_one_before_gone_on_with(tmp_path, limit, said):
    """The first limit is below the weights' file, the second below the optimizer's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saving = {"save_strategy": "steps", "save_steps": 2}
    try:
        with pytest.raises(JointoptError, match=f"train: '.*checkpoint-4' cannot be written: .*{said}"):
            trainer(tmp_path, callbacks=[_FullDisk(4, limit)], **saving).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again = trainer(tmp_path, **saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_a_checkpoint_that_was_killed_before_its_last_file_is_named(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    (tmp_path / "checkpoint-3/trainer_state.json").unlink()
    with pytest.raises(JointoptError, match="checkpoint-3' holds no trainer_state.json, which is written last"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
