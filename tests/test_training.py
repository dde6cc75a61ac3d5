"""Super-network training: what a step samples, what its gradients are, and that it goes on where it was killed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForTokenClassification

import jointopt
from jointopt import Distillation, Gene, JointoptError, Recipe, SearchSpace, Supernet
from jointopt.evaluation import logits_of
from jointopt.training import loop
from jointopt.training.distillation import soft_labels
from jointopt.training.elastic import task_loss
from jointopt.training.sampling import STRATEGIES, Attentive, Progressive, Sandwich, Uniform
from jointopt.training.sampling.attentive import beyond_limits
from tests.zoo import MODELS, batches, logits, make

CLASSES = {"bert": 3}


class Narrow(nn.Module):
    """A teacher of three classes that says so only when it is run."""

    num_labels = 5

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.flatten(1)[:, :3]


class Other(Narrow):
    """A teacher of other inputs."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return input_ids


def calibrated(name: str, **options) -> Supernet:
    model = make(name)
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


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategy_samples_the_same_for_the_same_step_and_others_for_another(name):
    supernet = calibrated("vit")
    options = {"region": lambda genomes: np.zeros(len(genomes))} if name == "attentive" else {}
    strategy = STRATEGIES[name](count=3, **options)
    first, again, other = (np.stack(strategy.genomes(supernet.space, 0.9, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    supernet.space.validate(first)


def test_the_sandwich_holds_the_smallest():
    space = calibrated("vit").space
    assert np.array_equal(Sandwich(2).genomes(space, 0.0, 0)[0], space.smallest)
    assert len(Sandwich(0).genomes(space, 0.0, 0)) == 1 and len(Uniform(4).genomes(space, 0.0, 0)) == 4


def test_progressive_sampling_frees_depth_then_widths_then_formats():
    space = calibrated("vit").space
    kinds = {"depth": [], "width": [], "precision": []}
    for at, name in enumerate(space.names):
        kinds["depth" if name == "depth" else "precision" if name.endswith("precision") else "width"].append(at)
    for progress, free in ((0.0, ["depth"]), (0.5, ["depth", "width"]), (0.9, ["depth", "width", "precision"])):
        genomes = np.stack(Progressive(8).genomes(space, progress, 0))
        for kind, places in kinds.items():
            moved = (genomes[:, places] != space.canonical(np.tile(space.largest, (9, 1)))[:, places]).any()
            # Genes of blocks that are gone are at their default, whatever is free.
            inside = [g for g in genomes if g[space.names.index("depth")] == space.largest[space.names.index("depth")]]
            moved_inside = any((g[places] != space.largest[places]).any() for g in inside)
            assert moved if kind == "depth" else moved_inside == (kind in free)


def test_attentive_sampling_keeps_to_the_region():
    supernet = calibrated("vit")
    sizes = sorted(supernet.cost_columns(supernet.space.sample(200, seed=5))["size"])
    limit = sizes[60] / 1e6
    strategy = Attentive(4, region=beyond_limits(supernet, {"size_mb": f"<= {limit}"}))
    for seed in range(5):
        genomes = np.stack(strategy.genomes(supernet.space, 0.0, seed))
        assert (supernet.cost_columns(genomes)["size"] <= limit * 1e6).all()


def test_attentive_sampling_of_a_space_of_few_genomes_repeats_them():
    space = SearchSpace([Gene("depth", (1, 2)), Gene("width", (8, 16))])
    drawn = Attentive(3, front=space.largest[None]).genomes(space, 0.0, 0)
    assert len(drawn) == 4 and all(space.is_canonical(genome[None]).all() for genome in drawn)


def test_attentive_sampling_stays_near_the_front():
    space = calibrated("vit").space
    front = space.sample(2, seed=3)
    near = np.stack(Attentive(20, front=front, mutation=0.1).genomes(space, 0.0, 0))[1:]
    far = space.sample(20, seed=1)
    distance = [np.mean([(front != genome).mean(1).min() for genome in each]) for each in (near, far)]
    assert distance[0] < distance[1] / 2


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
    total = task_loss(largest, batch)
    for genome in genomes:
        student = logits_of(supernet.training_view(genome), inputs)
        total = total + soft_labels(student, largest.detach(), batch.get("attention_mask"))
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
    task_loss(logits_of(view, inputs), batch).backward()
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
    assert again == history and not file.exists()
    assert all(torch.equal(t, resumed.model.state_dict()[k]) for k, t in whole.model.state_dict().items())


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 1)
    file = tmp_path / "training.safetensors"
    data = labelled("vit")

    def two(epoch: int):
        yield from data
        raise RuntimeError

    with pytest.raises(RuntimeError):
        jointopt.train_supernet(calibrated("vit"), two, 5, checkpoint=file)
    for options, named in (({}, "steps"), ({"learning_rate": 1e-4}, "learning_rate"), ({"seed": 1}, "seed")):
        steps = 5 if options else 6
        with pytest.raises(JointoptError, match=rf"training\.safetensors.*another training, with another {named}"):
            jointopt.train_supernet(calibrated("vit"), data, steps, checkpoint=file, **options)
    with pytest.raises(JointoptError, match="with another sampling"):
        jointopt.train_supernet(calibrated("vit"), data, 5, checkpoint=file, recipe=Recipe(Sandwich(1)))


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
                task_loss(logits_of(view, batches(name)[0]), labelled(name)[0]).backward()
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
    assert jointopt.finish(supernet, smallest, batches(name)).model is not None


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


def test_labels_may_be_probabilities_of_the_classes():
    logits = torch.randn(6, 5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(task_loss(logits, {"labels": one_hot}), task_loss(logits, {"labels": labels}))


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
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    supernet.calibrate(batches("bert"))
    batch = {**batches("bert")[0], "labels": torch.rand(6)}
    loss = lambda logits, batch: (logits[:, 0] - batch["labels"]).square().mean()  # noqa: E731
    with pytest.raises(JointoptError, match=r"logits of a single output.*Recipe\(distillation=None\)"):
        jointopt.elastic_loss(supernet, batch, 0, Recipe(loss=loss))
    assert jointopt.elastic_loss(supernet, batch, 0, Recipe(loss=loss, distillation=None)) > 0


def test_formats_without_ranges_are_refused_before_the_step_that_needs_them(tmp_path):
    trained = calibrated("vit", schemes=["W8A8_STATIC"])
    jointopt.train_supernet(trained, labelled("vit"), 1)
    trained.save(tmp_path / "supernet.safetensors")
    restored = Supernet(make("vit"), trained.space)
    restored.load(tmp_path / "supernet.safetensors")
    with pytest.raises(JointoptError, match="W8A8_STATIC needs ranges of activations; call calibrate"):
        jointopt.train_supernet(restored, labelled("vit"), 4, recipe=Recipe(precision_from=0.75))


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


def test_an_optimizer_whose_state_does_not_follow_channels_is_not_sorted():
    supernet = calibrated("vit")
    optimizer = torch.optim.Adafactor(supernet.model.parameters())
    jointopt.elastic_loss(supernet, labelled("vit")[0], 0).backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}
    with pytest.raises(JointoptError, match="sort_every: Adafactor keeps row_var"):
        supernet.sort_again(batches("vit"), optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.model.state_dict().items())
