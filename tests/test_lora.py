"""LoRA on a super-network: adapters are sliced with it, trained alone, and merged."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, TrainerCallback

import jointopt
from jointopt import ElasticTrainer, JointoptError, Recipe
from jointopt.config.config import load_config
from jointopt.models import LoadedModel, ModelSource, load_model
from jointopt.supernet.adapters import adapted
from jointopt.training import loop
from jointopt.training.configured import lora_of
from jointopt.training.lora import attach, merge
from jointopt.training.sampling import Sandwich
from tests.elastic_trainers import arguments, trainer, weights
from tests.saved import save_tokenizer
from tests.test_training import calibrated, labelled
from tests.zoo import batches, logits, make

peft = pytest.importorskip("peft")
TARGETS = {"llama_tied": ["q_proj", "v_proj", "down_proj"], "vit": ["q_proj", "fc1", "fc2"], "bert": ["query", "dense"]}


def config(name: str, **options):
    kept = None if name.startswith("llama") else ["classifier"]
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], modules_to_save=kept, **options)


def stir(supernet) -> None:
    """Adapters that do something, as after training."""
    for layer in adapted(supernet.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_adapters_begin_as_nothing_and_are_sliced_with_their_layers(name):
    supernet = calibrated(name)
    genomes = supernet.space.sample(3, seed=1)
    batch = batches(name)[0]
    before = [logits(supernet.training_view(genome).eval(), batch) for genome in genomes]
    attach(supernet, config(name))
    for genome, expected in zip(genomes, before, strict=True):
        assert torch.equal(logits(supernet.training_view(genome).eval(), batch), expected)
    stir(supernet)
    adapters = [logits(supernet.training_view(genome, precision=True).eval(), batch) for genome in genomes]
    merge(supernet)
    assert not adapted(supernet.model)
    for genome, found in zip(genomes, adapters, strict=True):
        torch.testing.assert_close(logits(supernet.training_view(genome, precision=True).eval(), batch), found)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_only_adapters_and_heads_are_trained(name):
    supernet = calibrated(name)
    paths = attach(supernet, config(name))
    jointopt.elastic_loss(supernet, labelled(name)[0], 0, Recipe(precision_from=0.0)).backward()
    with_gradients = {key for key, each in supernet.model.named_parameters() if each.grad is not None}
    expected = {f"{path}.{part}" for path in paths for part in ("lora_A", "lora_B")}
    heads = {key for key, _ in supernet.model.named_parameters() if key.startswith("classifier")}
    assert with_gradients == expected | (heads if not name.startswith("llama") else set())
    assert all(each.grad.abs().sum() > 0 for key, each in supernet.model.named_parameters() if key.endswith("lora_B"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
        ("distilbert", {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}),
        ("roberta", {"target_modules": ["query"], "modules_to_save": ["classifier.out_proj"]}),
        ("roberta", {"target_modules": ["dense"], "modules_to_save": ["out_proj"], "task_type": "SEQ_CLS"}),
        ("llama_untied", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "layers.2.mlp"]}),
    ],
)
def test_what_is_trained_whole_is_what_peft_trains_whole(name, options):
    wrapped = peft.get_peft_model(make(name), peft.LoraConfig(r=2, **options))
    expected = {
        key.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for key, each in wrapped.named_parameters()
        if each.requires_grad and "lora_" not in key and "original_module" not in key  # of PEFT 0.18
    }
    supernet, wanted = calibrated(name), peft.LoraConfig(r=2, **options)
    attach(supernet, wanted)
    found = {key for key, each in supernet.model.named_parameters() if each.requires_grad and "lora_" not in key}
    assert expected and found == expected
    assert wanted.modules_to_save == options.get("modules_to_save")


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (["clasifier"], "found 'clasifier', in which no module's path ends; did you mean 'classifier'.*bert, dropout"),
        (["weight"], "found 'weight', in which no module's path ends"),
        ("classifier", "found 'classifier'; allowed: a list of names"),
        ([3], "found .3.; allowed: a list of names"),
        (["encoder.layer"], "bert.encoder.layer is a ModuleList; allowed: modules that are called"),
    ],
)
def test_modules_to_save_that_name_no_module_are_refused(saved, said):
    with pytest.raises(JointoptError, match=f"^lora: modules_to_save: {said}"):
        attach(calibrated("bert"), peft.LoraConfig(target_modules=["query"], modules_to_save=saved))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("arrow_config", {}),
        ("kasa_config", {}),
        ("monteclora_config", {}),
        ("velora_config", {}),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}),
    ],
)
def test_variants_that_are_not_two_matrices_are_refused(option, value):
    if option not in {each.name for each in fields(peft.LoraConfig)}:
        pytest.skip("a later PEFT's")
    wanted = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **{option: value})
    with pytest.raises(JointoptError, match=f"^lora: found {option}=.*; allowed: (None|False)"):
        attach(calibrated("llama_untied"), wanted)


def test_a_variant_by_its_initial_weights_is_refused():
    try:
        wanted = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="mica")
        peft.get_peft_model(make("llama_untied"), wanted)
    except ValueError:
        pytest.skip("a later PEFT's")
    with pytest.raises(JointoptError, match="^lora: found a .*; allowed: adapters that are two matrices"):
        attach(calibrated("llama_untied"), wanted)


def test_a_config_that_peft_has_used_is_still_one():
    wanted = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(make("bert"), wanted)
    assert "score" in wanted.modules_to_save  # which this model lacks
    supernet = calibrated("bert")
    attach(supernet, wanted)
    assert supernet.model.classifier.weight.requires_grad


def test_adapters_of_a_bfloat16_model_are_in_float32_as_in_peft():
    supernet = calibrated("llama_tied", model=make("llama_tied").bfloat16())
    attach(supernet, config("llama_tied"))
    (layer, *_) = adapted(supernet.model).values()
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    stir(supernet)
    expected = logits(supernet.training_view(supernet.space.largest).eval(), batches("llama_tied")[0])
    before = layer.weight.detach().clone()
    merge(supernet)
    assert layer.weight.dtype == torch.bfloat16 and not torch.equal(layer.weight, before)
    found = logits(supernet.training_view(supernet.space.largest).eval(), batches("llama_tied")[0])
    assert torch.equal(found, expected)


def test_training_adapters_lowers_the_loss_and_changes_no_other_weight():
    supernet = calibrated("llama_tied")
    before = {key: each.clone() for key, each in supernet.model.state_dict().items()}
    history = jointopt.train_supernet(
        supernet, labelled("llama_tied"), 25, learning_rate=1e-2, lora=config("llama_tied"), seed=1
    )
    assert history[-1] < history[0]
    assert not adapted(supernet.model)
    changed = {key for key, each in supernet.model.state_dict().items() if not torch.equal(each, before[key])}
    assert changed and all(any(target in key for target in TARGETS["llama_tied"]) for key in changed)
    supernet.calibrate(batches("llama_tied"))
    study = jointopt.search(supernet, lambda m: float(logits(m, batches("llama_tied")[0]).std()), evaluations=3)
    assert len(study) == 3


def test_an_autocast_around_a_whole_training_sees_the_weights_of_each_step():
    before, after = [], []
    for lora in (config("llama_tied"), None):
        supernet = calibrated("llama_tied")
        with torch.autocast("cpu", torch.bfloat16):
            history = jointopt.train_supernet(
                supernet, labelled("llama_tied"), 25, learning_rate=1e-2, lora=lora, seed=1
            )
        before.append(history[0])
        after.append(history[-1])
    assert all(last < 0.9 * first for first, last in zip(before, after, strict=True))


@pytest.mark.parametrize("where", ["in another process", "on the same object"])
def test_adapters_resume_to_the_same_weights(where, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 2)
    data = labelled("vit", count=3)
    options = {"learning_rate": 1e-2, "lora": config("vit")}
    torch.manual_seed(0)
    whole = calibrated("vit")
    jointopt.train_supernet(whole, data, 6, **options)

    def killed_at(epoch: int):
        if epoch == 1:
            raise RuntimeError
        return [data[index] for index in np.random.default_rng([0, epoch]).permutation(3)]

    file = tmp_path / "training.safetensors"
    torch.manual_seed(0)
    killed = calibrated("vit")
    with pytest.raises(RuntimeError):
        jointopt.train_supernet(killed, killed_at, 6, checkpoint=file, **options)
    assert not adapted(killed.model) and all(each.requires_grad for each in killed.model.parameters())
    killed.calibrate(batches("vit"))
    resumed = killed if where == "on the same object" else calibrated("vit")
    jointopt.train_supernet(resumed, data, 6, checkpoint=file, **options)
    assert all(torch.equal(each, resumed.model.state_dict()[key]) for key, each in whole.model.state_dict().items())


def test_the_trainer_trains_adapters_resumes_them_and_merges_them(tmp_path):
    rows = [{key: value[at] for key, value in labelled("vit")[0].items()} for at in range(6)]

    def made(folder: str, **options):
        torch.manual_seed(3)
        kept = arguments(tmp_path / folder, max_steps=4, learning_rate=1e-2, **options)
        return ElasticTrainer(model=make("vit"), args=kept, train_dataset=rows, lora=config("vit"))

    whole = made("whole")
    whole.train()
    assert not adapted(whole.supernet.model)
    first = made("parts", save_strategy="steps", save_steps=2)
    first.train()
    resumed = made("parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for key, each in whole.supernet.model.state_dict().items():
        assert torch.equal(each, resumed.supernet.model.state_dict()[key]), key


def test_adapters_are_evaluated_with_the_model(tmp_path):
    rows = [{key: value[at] for key, value in labelled("vit")[0].items()} for at in range(6)]
    kept = arguments(tmp_path, max_steps=6, learning_rate=1e-2, eval_strategy="steps", eval_steps=3)
    made = ElasticTrainer(model=make("vit"), args=kept, train_dataset=rows, eval_dataset=rows, lora=config("vit"))
    made.train()
    logged = [log["eval_loss"] for log in made.state.log_history if "eval_loss" in log]
    assert logged[0] != logged[1] and logged[1] == pytest.approx(made.evaluate()["eval_loss"], rel=1e-4)


def test_impossible_adapters_are_refused_at_the_start():
    supernet = calibrated("llama_tied")
    for match, wanted in {
        "lora: .*not_there": peft.LoraConfig(target_modules=["not_there"]),
        "lm_head shares its weight": peft.LoraConfig(target_modules=["lm_head"]),
        "lora_dropout": config("llama_tied", lora_dropout=0.1),
        "bias='all'": config("llama_tied", bias="all"),
        r"trainable_token_indices=\[1\]": config("llama_tied", trainable_token_indices=[1]),
        "found dict": {"r": 4},
    }.items():
        with pytest.raises(JointoptError, match=match):
            jointopt.train_supernet(supernet, labelled("llama_tied"), 1, lora=wanted)
    with pytest.raises(JointoptError, match="sort_every"):
        jointopt.train_supernet(supernet, labelled("llama_tied"), 1, lora=config("llama_tied"), sort_every=2)
    attach(supernet, config("llama_tied"))
    with pytest.raises(JointoptError, match="adapters already"):
        attach(supernet, config("llama_tied"))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["qkv"], "found 'qkv', which is no Linear layer here, .*; allowed: fc1, fc2, head, k, proj, q, v"),
        (["fc1", "fc3"], "found 'fc3', which is no Linear layer here, .*; did you mean 'fc2'"),
        (".*qkv_proj", "not found in the base model.*allowed: fc1, fc2, head, k, proj, q, v"),
    ],
)
def test_targets_that_name_no_layer_are_refused_with_those_that_do(targets, said):
    with pytest.raises(JointoptError, match=f"lora: .*{said}"):
        attach(calibrated("timm_vit"), peft.LoraConfig(target_modules=targets))


def test_adapters_of_convolutions_are_refused_with_the_linear_layers_that_there_are():
    said = "found 'convolution', which is no Linear layer here, and others get no adapters; allowed: classifier.1$"
    with pytest.raises(JointoptError, match=f"^lora: target_modules: {said}"):
        attach(calibrated("resnet"), peft.LoraConfig(target_modules=["convolution"]))


def test_a_config_is_told_its_own_key_of_a_target_that_names_no_layer(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: m\ntask: image-classification\ndata: {train: t.csv, calibrate: t.csv, evaluate: t.csv}\noutput: o\n"
        "train: {steps: 1, lora: {targets: [q, out]}}\n"
    )
    with pytest.raises(JointoptError, match=r"^train.lora.targets: found 'out', which is no Linear layer here"):
        loaded = LoadedModel(make("timm_vit"), None, "image-classification", ModelSource("m", "timm", "m"))
        lora_of(load_config(tmp_path / "c.yaml"), calibrated("timm_vit"), loaded)


def test_a_config_trains_heads_whole_and_what_the_checkpoint_lacks(tmp_path):
    BertForMaskedLM(make("bert").config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "c.yaml").write_text(
        f"model: {tmp_path}\ntask: text-classification\noutput: o\n"
        "data: {train: t.csv, calibrate: t.csv, evaluate: t.csv}\n"
        "train: {steps: 1, lora: {targets: [query, dense]}}\n"
    )
    loaded = load_model(str(tmp_path), "text-classification", "cpu")
    supernet = jointopt.Supernet(loaded.model, jointopt.SearchSpace.for_model(loaded.model))
    paths = attach(supernet, lora_of(load_config(tmp_path / "c.yaml"), supernet, loaded))
    whole = {
        key.rpartition(".")[0]
        for key, each in supernet.model.named_parameters()
        if each.requires_grad and "lora_" not in key
    }
    assert whole == {"classifier", "bert.pooler.dense"} and "bert.pooler.dense" not in paths


def test_a_view_in_the_middle_of_training_computes_with_the_adapters(tmp_path):
    supernet = calibrated("vit", schemes=["none"])
    attach(supernet, config("vit"))
    stir(supernet)
    batch = batches("vit")[0]
    for genome in (supernet.space.smallest, supernet.space.largest):
        expected = logits(supernet.training_view(genome).eval(), batch)
        with supernet.active(genome) as view:
            torch.testing.assert_close(logits(view, batch), expected)
        folder = jointopt.export(supernet, genome, tmp_path / str(genome.sum()))
        assert not jointopt.verify(folder).differences
    assert adapted(supernet.model)


def test_adapters_of_a_block_that_left_learn_nothing_from_the_sub_network():
    supernet = calibrated("vit", depth=[2, 3], schemes=["none"])
    leaving = int(supernet.leaving["depth"][0].removeprefix("block"))
    attach(supernet, peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[leaving]))
    jointopt.elastic_loss(supernet, labelled("vit")[0], 0, Recipe(Sandwich(0))).backward()
    found = {name: each.grad for name, each in supernet.model.named_parameters() if each.requires_grad}
    assert len(found) == 2 and any(each.any() for each in found.values())


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_training_that_was_interrupted_leaves_its_adapters_in_the_weights(tmp_path):
    made = trainer(tmp_path, lora=config("vit"), callbacks=[Stops()], learning_rate=1e-2)
    before = made.supernet.model.get_parameter("vit.layers.0.attention.q_proj.weight").clone()
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert not adapted(made.supernet.model)
    assert all(each.requires_grad for each in made.supernet.model.parameters())
    assert not torch.equal(made.supernet.model.get_parameter("vit.layers.0.attention.q_proj.weight"), before)
    made.remove_callback(Stops)
    middle = weights(made)
    made.train()  # new adapters, and nothing else
    moved = {name for name, tensor in weights(made).items() if not torch.equal(tensor, middle[name])}
    assert moved and all(any(part in name for part in (*TARGETS["vit"], "classifier")) for name in moved)
