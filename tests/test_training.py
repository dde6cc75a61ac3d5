"""Super-network training: what the gradients of a step are, and that it goes on where it was killed."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import jointopt
from jointopt import Distillation, JointoptError, Recipe, SearchSpace, Supernet
from jointopt.outputs import logits_of
from jointopt.training import checkpoint, loop
from jointopt.training.distillation import soft_labels
from jointopt.training.recipe import TaskLoss
from jointopt.training.sampling import Sandwich
from tests.zoo import MODELS, batches, logits, make

CLASSES = {"bert": 3}


def calibrated(name: str, model: nn.Module | None = None, **options) -> Supernet:
    model = model or make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, **{"schemes": ["none", "W8A8"], **options}))
    supernet.calibrate(batches(name))
    return supernet


def labelled(name: str, count: int = 2) -> list[dict]:
    found = batches(name, count=count)
    if name.startswith("llama"):
        return [{**batch, "labels": batch["input_ids"]} for batch in found]
    return [{**batch, "labels": torch.arange(6) % CLASSES.get(name, 5)} for batch in found]


def gradients(supernet: Supernet) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in supernet.model.named_parameters() if each.grad is not None}


def still(model: nn.Module) -> None:
    """Without dropout, so that two passes can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


@pytest.mark.parametrize(
    ("name", "samples"),
    [("vit", 6), ("bert", 6), ("llama_tied", 6), ("resnet", 6), ("timm_vit", 6), ("vit", 1), ("timm_vit", 1)],
)
def test_gradients_are_those_of_the_losses_one_by_one(name, samples):
    supernet = calibrated(name)
    still(supernet.model)
    batch = {key: value[:samples] for key, value in labelled(name)[0].items()}
    recipe = Recipe(Sandwich(1), seed=4)
    jointopt.elastic_loss(supernet, batch, 3, recipe).backward()
    found = gradients(supernet)
    supernet.model.zero_grad()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    from jointopt.training.sampling import step_seed

    genomes = Sandwich(1).genomes(supernet.space, 0.0, step_seed(4, 3))
    largest = logits_of(supernet.training_view(supernet.space.largest), inputs)
    total = TaskLoss()(largest, batch)
    counted = slice(-1) if largest.dim() == 3 else slice(None)  # of the last token's successor nothing is known
    for genome in genomes:
        student = logits_of(supernet.training_view(genome), inputs)
        mask = batch.get("attention_mask")
        total = total + soft_labels(student[:, counted], largest[:, counted].detach(), mask)
    total.backward()
    expected = gradients(supernet)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


def test_whoever_hooks_an_embedding_s_gradient_gets_it_whole():
    supernet = calibrated("bert")
    still(supernet.model)
    batch, rows = labelled("bert")[0], slice(0, 5)
    weight = next(m for m in supernet.model.modules() if isinstance(m, nn.Embedding)).weight

    def frozen(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clone().index_fill_(0, torch.arange(5), 0.0)

    jointopt.elastic_loss(supernet, batch, 0).backward()
    free = weight.grad.clone()
    supernet.model.zero_grad()
    handle = weight.register_hook(frozen)
    jointopt.elastic_loss(supernet, batch, 0).backward()
    handle.remove()
    assert free[rows].any() and not weight.grad[rows].any()
    torch.testing.assert_close(weight.grad[5:], free[5:])


def test_a_step_leaves_the_super_network_s_mode_and_config_alone():
    supernet = calibrated("bert")
    before = [module.training for module in supernet.model.modules()]
    jointopt.elastic_loss(supernet, labelled("bert")[0], 0).backward()
    assert [module.training for module in supernet.model.modules()] == before
    view = supernet.training_view(supernet.space.largest)
    assert view.training and view.config is not supernet.model.config


def test_a_scaled_loss_gives_scaled_gradients_and_two_add_up():
    supernet = calibrated("vit")
    still(supernet.model)
    batch = labelled("vit")[0]
    jointopt.elastic_loss(supernet, batch, 0).backward()
    once = gradients(supernet)
    (jointopt.elastic_loss(supernet, batch, 0) * 2).backward()
    for key, gradient in gradients(supernet).items():
        torch.testing.assert_close(gradient, 3 * once[key])


def test_without_gradients_the_loss_is_the_same_number():
    supernet = calibrated("vit")
    still(supernet.model)
    batch = labelled("vit")[0]
    with torch.no_grad():
        value = jointopt.elastic_loss(supernet, batch, 0)
    assert not value.requires_grad
    torch.testing.assert_close(value, jointopt.elastic_loss(supernet, batch, 0).detach())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_with_precision_a_view_computes_what_the_search_scores(name):
    schemes = ["W8A8", "W4A16", "FP8_DYNAMIC", "MXFP4", "W8A8_STATIC"]
    supernet = calibrated(name, schemes=schemes)
    batch = batches(name)[0]
    plain = {module for module in supernet.model.modules() if isinstance(module, nn.BatchNorm2d)}
    for genome in supernet.space.sample(3, seed=1):
        view = supernet.training_view(genome, precision=True).eval()
        with supernet.active(genome) as scored:
            if plain:  # their statistics are estimated anew for what is scored
                scored = supernet.built(supernet.plan(genome))
            assert torch.equal(logits(view, batch), logits(scored, batch))


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8", "NVFP4", "MXFP4", "W8A8_ASYM_BOTH"])
def test_gradients_go_straight_through_the_rounding(scheme):
    supernet = calibrated("bert", schemes=[scheme], preset="fixed", precision_per="layer")
    still(supernet.model)
    batch = labelled("bert")[0]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    view = supernet.training_view(supernet.space.largest, precision=True)
    layer = view.bert.encoder.layer[-1].output.dense
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = []
    layer.register_forward_hook(lambda module, args, result: (result.retain_grad(), output.append(result))[0])
    TaskLoss()(logits_of(view, inputs), batch).backward()
    weight = supernet.model.bert.encoder.layer[-1].output.dense.weight
    held = layer._held(seen[0].detach())
    expected = output[0].grad.flatten(0, 1).mT @ held.flatten(0, 1)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_precision_begins_after_its_share_of_the_steps():
    supernet = calibrated("vit", schemes=["W4A16"])
    recipe = Recipe(precision_from=0.5)
    batch = labelled("vit")[0]
    still(supernet.model)
    values = [float(jointopt.elastic_loss(supernet, batch, step, recipe, 4).detach()) for step in (1, 2)]
    plain = [float(jointopt.elastic_loss(supernet, batch, step, Recipe(), 4).detach()) for step in (1, 2)]
    assert values[0] == plain[0] and values[1] != plain[1]


@pytest.mark.parametrize("options", [{"hidden": 1.0}, {"attention": 1.0}, {"labels": 0.5}, {"temperature": 3.0}])
@pytest.mark.parametrize("name", ["vit", "bert", "llama_tied", "timm_vit"])
def test_what_is_distilled_draws_the_smallest_towards_the_largest(name, options):
    supernet = calibrated(name, schemes=["none"])
    still(supernet.model)
    data = labelled(name, count=1)
    recipe = Recipe(Sandwich(0), Distillation(**options))
    first = float(jointopt.elastic_loss(supernet, data[0], 0, recipe).detach())
    jointopt.train_supernet(supernet, data, 12, recipe=recipe, learning_rate=1e-3)
    assert float(jointopt.elastic_loss(supernet, data[0], 0, recipe).detach()) < first


def test_a_sub_network_equal_to_its_teacher_has_nothing_to_learn():
    supernet = calibrated("bert", schemes=["none"])
    still(supernet.model)
    batch = labelled("bert")[0]

    class Largest:
        def genomes(self, space, progress, seed):
            return [space.largest]

    plain, more = (
        float(jointopt.elastic_loss(supernet, batch, 0, Recipe(Largest(), d)).detach())
        for d in (Distillation(), Distillation(hidden=5.0, attention=5.0))
    )
    assert abs(plain - more) < 1e-5


def test_a_given_teacher_is_learned_from_and_left_as_it_was():
    supernet = calibrated("vit", schemes=["none"])
    teacher = make("vit", seed=7).train()
    before = copy.deepcopy(teacher.state_dict())
    data = labelled("vit", count=1)
    inputs = {k: v for k, v in data[0].items() if k != "labels"}
    recipe = Recipe(distillation=Distillation(teacher=teacher))

    def distance() -> float:
        with torch.no_grad():
            given = teacher.eval()(**inputs).logits
            found = logits_of(supernet.training_view(supernet.space.largest).eval(), inputs)
        teacher.train()
        return float(soft_labels(found, given))

    first = distance()
    jointopt.train_supernet(supernet, data, 20, recipe=recipe, learning_rate=1e-3)
    assert distance() < first
    assert teacher.training and all(torch.equal(t, before[k]) for k, t in teacher.state_dict().items())


def test_one_sub_network_s_activations_are_alive_at_a_time():
    supernet = calibrated("vit", schemes=["none"])
    alive, most = 0, 0

    def pack(tensor):
        nonlocal alive, most
        alive += tensor.numel()
        most = max(most, alive)
        return _Counted(tensor)

    class _Counted:
        def __init__(self, tensor):
            self.tensor = tensor

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.numel()

    def peak(recipe: Recipe) -> int:
        nonlocal alive, most
        alive = most = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            jointopt.elastic_loss(supernet, labelled("vit")[0], 0, recipe).backward()
        return most

    assert peak(Recipe(Sandwich(6))) <= 1.05 * peak(Recipe(Sandwich(1)))


def test_a_training_that_was_killed_ends_with_the_same_weights_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 4)
    data = labelled("bert", count=3)
    recipe = Recipe(precision_from=0.5, seed=2)
    whole = calibrated("bert")
    history = jointopt.train_supernet(whole, data, 10, recipe=recipe, learning_rate=1e-3)

    class Killed(RuntimeError):
        pass

    def killed_at(epoch: int):
        if epoch == 2:
            raise Killed
        order = np.random.default_rng([0, epoch]).permutation(3)
        return [data[index] for index in order]

    file = tmp_path / "training.safetensors"
    with pytest.raises(Killed):
        jointopt.train_supernet(calibrated("bert"), killed_at, 10, recipe=recipe, learning_rate=1e-3, checkpoint=file)
    assert file.is_file()
    resumed = calibrated("bert")
    again = jointopt.train_supernet(resumed, data, 10, recipe=recipe, learning_rate=1e-3, checkpoint=file)
    assert again == history
    assert all(torch.equal(t, resumed.model.state_dict()[k]) for k, t in whole.model.state_dict().items())


def test_a_checkpoint_is_readable_to_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        jointopt.train_supernet(calibrated("vit"), labelled("vit"), 1, checkpoint=tmp_path / "training.safetensors")
    finally:
        os.umask(before)
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [
        ("training.safetensors", 0o640)
    ]


def test_a_training_that_ended_is_taken_from_its_checkpoint(tmp_path):
    data, file = labelled("bert"), tmp_path / "training.safetensors"
    trained, again = calibrated("bert"), calibrated("bert")
    history = jointopt.train_supernet(trained, data, 3, checkpoint=file)
    assert jointopt.train_supernet(again, lambda epoch: pytest.fail("trained anew"), 3, checkpoint=file) == history
    assert all(torch.equal(t, again.model.state_dict()[k]) for k, t in trained.model.state_dict().items())


def interrupted(data: list[dict[str, Tensor]], steps: int, **options: Any) -> None:
    """A training that ends with its data, before all of its steps."""

    def failing(epoch: int):
        yield from data
        raise RuntimeError

    with pytest.raises(RuntimeError):
        jointopt.train_supernet(calibrated("vit"), failing, steps, **options)


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 1)
    file = tmp_path / "training.safetensors"
    data = labelled("vit")

    interrupted(data, 5, checkpoint=file)
    for options, named in (({}, "steps"), ({"learning_rate": 1e-4}, "learning_rate"), ({"seed": 1}, "seed")):
        steps = 5 if options else 6
        with pytest.raises(JointoptError, match=rf"training\.safetensors.*another training, with another {named}"):
            jointopt.train_supernet(calibrated("vit"), data, steps, checkpoint=file, **options)
    with pytest.raises(JointoptError, match="with another sampling"):
        jointopt.train_supernet(calibrated("vit"), data, 5, checkpoint=file, recipe=Recipe(Sandwich(1)))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"data": {("a", 1): 2}}, r"config\.data: found the key \('a', 1\); allowed: text or whole numbers"),
        ({"data": [object()]}, r"config\.data\[0\]: found <object object.*; allowed: text, numbers, paths"),
    ],
)
def test_a_config_that_no_other_process_could_compare_is_refused(tmp_path, config, told):
    with pytest.raises(JointoptError, match=told):
        jointopt.train_supernet(calibrated("vit"), labelled("vit"), 1, checkpoint=tmp_path / "file", config=config)


def test_a_checkpoint_does_not_compare_the_objects_of_a_sampling_strategy(tmp_path, monkeypatch):
    class WithObject(Sandwich):
        def __init__(self, count: int, rate: float = 0.5):
            super().__init__(count)
            self.held = object()
            self.settings = Distillation(temperature=rate)

    monkeypatch.setattr(loop, "EVERY", 1)
    file, data = tmp_path / "training.safetensors", labelled("vit")

    interrupted(data, 3, checkpoint=file, recipe=Recipe(WithObject(1)))
    with pytest.raises(JointoptError, match="with another sampling"):
        jointopt.train_supernet(calibrated("vit"), data, 3, checkpoint=file, recipe=Recipe(WithObject(2)))
    with pytest.raises(JointoptError, match="with another sampling"):
        jointopt.train_supernet(calibrated("vit"), data, 3, checkpoint=file, recipe=Recipe(WithObject(1, 0.75)))
    assert len(jointopt.train_supernet(calibrated("vit"), data, 3, checkpoint=file, recipe=Recipe(WithObject(1)))) == 3


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 1)
    file, data = tmp_path / "training.safetensors", labelled("vit")

    interrupted(data, 5, checkpoint=file)
    with safe_open(file, framework="pt") as opened:
        written = opened.metadata()["training"]
    tensors, last = load_file(file), f"model.{list(calibrated('vit').model.state_dict())[-1]}"
    for damaged, record, told in (
        (tensors, "{", "Expecting property name"),
        (tensors, "[1]", "AttributeError: 'list' object has no attribute 'get'"),
        (tensors, json.dumps({**json.loads(written), "history": None}), "TypeError"),
        ({**tensors, "random": tensors["random"][:8]}, written, ".*RNG"),
        ({**tensors, "random": torch.zeros_like(tensors["random"])}, written, "Invalid mt19937 state"),
        ({**tensors, last: torch.zeros(1)}, written, f"{last} is missing, or of another shape"),
        ({**tensors, "optimizer.999.exp_avg": torch.zeros(3)}, written, "IndexError"),
    ):
        save_file(damaged, file, metadata={"training": record})
        supernet = calibrated("vit")
        before = copy.deepcopy(supernet.model.state_dict())
        with pytest.raises(JointoptError, match=f"training.safetensors' cannot be read: {told}.*; allowed: remove it"):
            jointopt.train_supernet(supernet, data, 5, checkpoint=file)
        assert all(torch.equal(each, before[name]) for name, each in supernet.model.state_dict().items())


def test_a_checkpoint_that_memory_lacks_for_is_not_called_damaged(tmp_path, monkeypatch):
    file = tmp_path / "training.safetensors"
    file.write_bytes(b"good work")

    def lacking(path, key):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(checkpoint, "read_tensors", lacking)
    with pytest.raises(torch.OutOfMemoryError):
        jointopt.train_supernet(calibrated("vit"), labelled("vit"), 5, checkpoint=file)


@pytest.mark.parametrize("name", ["vit", "llama_tied", "resnet"])
def test_sorting_again_changes_neither_the_function_nor_the_optimizer_s_next_step(name):
    found = []
    for sort in (False, True):
        supernet = calibrated(name, schemes=["none"])
        still(supernet.model)
        for module in supernet.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-2)
        for step in range(4):
            optimizer.zero_grad()
            jointopt.elastic_loss(supernet, labelled(name)[0], step, Recipe(Sandwich(0))).backward()
            if step == 3:  # the last step's gradients are of the largest alone, whatever the order
                optimizer.zero_grad()
                if sort:
                    supernet.sort_again(batches(name), optimizer)
                view = supernet.training_view(supernet.space.largest)
                TaskLoss()(logits_of(view, batches(name)[0]), labelled(name)[0]).backward()
            optimizer.step()
        found.append(logits(supernet.training_view(supernet.space.largest).eval(), batches(name)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_what_was_measured_before_sorting_again_no_longer_holds():
    supernet = calibrated("vit")
    jointopt.search(supernet, lambda model: 1.0, evaluations=2)
    assert supernet.calibrated and supernet.scores
    supernet.sort_again(batches("vit"))
    assert not supernet.calibrated and not supernet.scores


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit", {"schemes": ["W8A8_STATIC"]}, "the ranges of W8A8_STATIC were measured"),
        ("llama_tied", {"schemes": ["none"], "caches": ["INT8"]}, "the ranges of INT8 were measured"),
    ],
)
def test_ranges_of_the_weights_before_training_are_neither_scored_nor_exported(name, options, said, tmp_path):
    supernet = calibrated(name, preset="fixed", **options)
    jointopt.train_supernet(supernet, labelled(name), 2)
    smallest = supernet.space.smallest
    for use in (
        lambda: jointopt.finish(supernet, smallest, batches(name)),
        lambda: jointopt.finish(supernet, smallest, batches(name), steps=2),
        lambda: jointopt.export(supernet, smallest, tmp_path / "export"),
        lambda: supernet.extract(smallest),
    ):
        with pytest.raises(JointoptError, match=said + r"; call supernet.calibrate\(batches\) again"):
            use()
    supernet.calibrate(batches(name))
    finished = jointopt.finish(supernet, smallest, batches(name)).model
    assert logits(finished, batches(name)[0]).isfinite().all()


def test_between_steps_a_sub_network_has_the_codes_of_the_weights_as_they_are():
    supernet = calibrated("bert", schemes=["W8A8"])
    optimizer = torch.optim.SGD(supernet.model.parameters(), lr=0.5)
    jointopt.elastic_loss(supernet, labelled("bert")[0], 0).backward()
    before = logits(supernet.extract(supernet.space.largest), batches("bert")[0])
    optimizer.step()
    after = logits(supernet.extract(supernet.space.largest), batches("bert")[0])
    supernet.weights_changed()
    assert torch.equal(after, logits(supernet.extract(supernet.space.largest), batches("bert")[0]))
    assert not torch.allclose(before, after)


def test_layers_that_were_fitted_before_training_are_not_left_out_unsaid():
    model = make("bert")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]), repair=True)
    supernet.calibrate(batches("bert"))
    jointopt.train_supernet(supernet, labelled("bert"), 2)
    with pytest.raises(JointoptError, match=r"repair: weights were trained .* call supernet.calibrate"):
        supernet.extract(supernet.space.smallest)
    supernet.extract(supernet.space.largest)


def test_statistics_of_narrow_sub_networks_do_not_enter_the_whole_one_s():
    supernet = calibrated("resnet", schemes=["none"])
    norms = [m for m in supernet.model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    view = supernet.training_view(supernet.space.smallest)
    view(**batches("resnet")[0])
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    supernet.training_view(supernet.space.largest)(**batches("resnet")[0])
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
