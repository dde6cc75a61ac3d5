"""What people do to a model while they fine-tune it: hooks, frozen parts, averages, their own optimizers and data."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from transformers import TrainerCallback, ViTForImageClassification

import jointopt
from jointopt import ElasticTrainer, JointoptError, Recipe
from jointopt.supernet.adapters import adapted
from tests.elastic_trainers import arguments, data, trainer, weights
from tests.test_training import calibrated, gradients, labelled, still
from tests.zoo import batches, logits, make

peft = pytest.importorskip("peft")


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"])


def test_a_hook_on_a_gradient_sees_that_of_the_whole_step_once():
    found = []
    for hooked in (False, True):
        supernet = calibrated("bert")
        still(supernet.model)
        for parameter in supernet.model.parameters() if hooked else ():
            parameter.register_hook(lambda gradient: gradient * 0.125)
        jointopt.elastic_loss(supernet, labelled("bert")[0], 0).backward()
        found.append(gradients(supernet))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient * 0.125)


def test_hooks_on_gradients_count_in_the_training_loop_too():
    supernet = calibrated("vit")
    before = supernet.model.classifier.weight.clone()
    supernet.model.classifier.weight.register_hook(torch.zeros_like)
    jointopt.train_supernet(supernet, labelled("vit"), 2, learning_rate=1e-2, weight_decay=0.0)
    assert torch.equal(supernet.model.classifier.weight, before)


def test_a_batch_norm_in_eval_mode_keeps_its_statistics():
    supernet = calibrated("resnet")
    supernet.model.train()
    norms = [module for module in supernet.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    before = [norm.running_mean.clone() for norm in norms]
    jointopt.elastic_loss(supernet, labelled("resnet")[0], 0).backward()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


def test_a_copy_of_a_super_network_notices_that_its_weights_have_changed():
    supernet = calibrated("vit", schemes=["W8A8_STATIC"])
    average = copy.deepcopy(supernet)
    with torch.no_grad():
        for parameter in average.model.parameters():
            parameter.lerp_(torch.zeros_like(parameter), 0.1)
    with (
        pytest.raises(JointoptError, match="weights were trained since the ranges"),
        average.active(average.space.largest),
    ):
        pass
    with supernet.active(supernet.space.largest):
        assert not supernet.trained


def test_a_training_view_has_the_weights_that_were_loaded():
    supernet = calibrated("vit", schemes=["W4A16"])
    genome, batch = supernet.space.largest, batches("vit")[0]
    supernet.training_view(genome, precision=True)
    state = {name: each * 2 for name, each in supernet.model.state_dict().items()}
    supernet.model.load_state_dict(state)
    found = logits(supernet.training_view(genome, precision=True).eval(), batch)
    supernet.weights_changed()
    assert torch.equal(found, logits(supernet.training_view(genome, precision=True).eval(), batch))


def test_what_was_frozen_before_adapters_came_is_frozen_when_they_are_merged():
    supernet = calibrated("vit")
    supernet.model.vit.embeddings.requires_grad_(False)
    before = {name for name, each in supernet.model.named_parameters() if each.requires_grad}
    jointopt.train_supernet(supernet, labelled("vit"), 2, lora=lora())
    assert {name for name, each in supernet.model.named_parameters() if each.requires_grad} == before


def several_classes(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"].float())


@pytest.mark.parametrize("given", [torch.float32, torch.long])
def test_labels_of_several_classes_are_not_distilled_as_if_they_were_one(given):
    supernet = calibrated("vit")
    labels = (torch.arange(30).view(6, 5) % 2).to(given)
    batch = {**labelled("vit")[0], "labels": labels}
    with pytest.raises(JointoptError, match=r"found labels .* that are no probabilities.*config\.problem_type"):
        jointopt.elastic_loss(supernet, batch, 0, Recipe(loss=several_classes))
    jointopt.elastic_loss(supernet, batch, 0, Recipe(loss=several_classes, distillation=None)).backward()


def test_a_loss_that_does_not_take_a_batch_is_named():
    recipe = Recipe(loss=nn.CrossEntropyLoss())
    with pytest.raises(JointoptError, match="^loss: .*not dict; allowed: a function of logits and batch"):
        jointopt.elastic_loss(calibrated("vit"), labelled("vit")[0], 0, recipe)


def test_checkpoints_of_activations_that_cannot_be_gone_back_from_are_named():
    supernet = calibrated("bert")
    supernet.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(JointoptError, match="use_reentrant=True.*allowed: use_reentrant=False"):
        jointopt.elastic_loss(supernet, labelled("bert")[0], 0)


def test_the_trainer_calibrates_with_samples_from_all_of_the_data(tmp_path):
    rows = [{"pixel_values": torch.full((3, 16, 16), float(at)), "labels": at // 100} for at in range(400)]
    made = [ElasticTrainer(model=make("vit"), args=arguments(tmp_path), train_dataset=rows) for _ in range(2)]
    first, second = ([x for batch in m._calibration for x in batch["pixel_values"][:, 0, 0, 0].tolist()] for m in made)
    assert first == second and len(set(first)) == 128
    assert {int(at) // 100 for at in first} == {0, 1, 2, 3}


def test_an_optimizer_that_would_not_train_the_adapters_is_refused(tmp_path):
    for options in ({"lora": lora()}, {"recipe": Recipe(precision_from=0.0, learned_ranges=True)}):
        supernet = calibrated("vit")
        optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-2)
        with pytest.raises(JointoptError, match="optimizers: found one made before (adapters|learned ranges)"):
            ElasticTrainer(
                supernet=supernet,
                args=arguments(tmp_path),
                train_dataset=data(),
                optimizers=(optimizer, None),
                **options,
            )
        assert not adapted(supernet.model) and supernet.learned is None


class Unfreeze(TrainerCallback):
    """Embeddings learn from the third step on."""

    def on_step_begin(self, args, state, control, model=None, **others):
        model.vit.embeddings.requires_grad_(state.global_step >= 3)


def test_layers_may_be_unfrozen_while_training(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}

    def made() -> ElasticTrainer:
        model = make("vit")
        model.vit.embeddings.requires_grad_(False)
        return trainer(tmp_path, model, callbacks=[Unfreeze()], **options)

    whole = made()
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(each, weights(whole)[name]) for name, each in weights(resumed).items())


def test_a_checkpoint_of_adapters_is_the_adapted_model_for_whoever_loads_it(tmp_path):
    made = trainer(tmp_path, lora=lora(), learning_rate=2e-2, save_strategy="steps", save_steps=6)
    batch = made.data_collator(data(8, 1))
    inputs = {"pixel_values": batch["pixel_values"]}
    untrained = logits(make("vit").eval(), inputs)
    made.train()
    found = logits(ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-6").eval(), inputs)
    torch.testing.assert_close(found, logits(made.supernet.model.eval(), inputs))
    assert (found - untrained).abs().max() > 1e-3


def test_labels_may_have_a_name_that_the_model_does_not_know(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    rows = [{"x": each["pixel_values"], "target": each["labels"]} for each in data()]
    args = arguments(tmp_path, label_names=["target"], eval_strategy="steps", eval_steps=3, remove_unused_columns=False)
    made = ElasticTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8])
    made.train()
    assert made.evaluate()["eval_loss"] > 0


def test_another_training_sorts_again(tmp_path):
    args = arguments(tmp_path, max_steps=4)
    made = ElasticTrainer(model=make("vit"), args=args, train_dataset=data(), sort_every=3)
    calls, sort = [], made.supernet.sort_again
    made.supernet.sort_again = lambda *given: (calls.append(made.state.global_step), sort(*given))
    made.train()
    made.train()
    assert calls == [3, 3]
