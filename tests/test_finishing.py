"""Finishing: other weights for the same plan, each layer's from the inputs that it really gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import jointopt
from jointopt import JointoptError, Objective, SearchSpace, Supernet
from jointopt.finishing.finishing import Finishing, finish_top
from jointopt.finishing.lockstep import in_step, starting
from jointopt.study.choice import improves
from tests.zoo import MODELS, RELATIVES, batches, logits, make, mean_square, supernet_of

SCHEMES = ["W4A16", "NVFP4A16", "MXFP4A16", "W4A16_ASYM", "FP4A16", "W8A16_CHANNEL", "FP8A16"]


quality = mean_square("bert", seed=3)


@pytest.mark.parametrize("name", [name for name in (*MODELS, *RELATIVES) if "resnet" not in name])
def test_a_finished_sub_network_is_nearer_to_its_unquantized_self_than_one_rounded_to_nearest(name):
    supernet = supernet_of(name, SCHEMES)
    plain, nearest, finished = [], [], []
    for genome in supernet.space.sample(2, seed=1):
        batch = batches(name, count=1, seed=1)[0]
        plan = supernet.plan(genome)
        plain.append(logits(supernet.view(replace(plan, schemes={})), batch))
        nearest.append(logits(supernet.extract(genome), batch))
        finished.append(logits(jointopt.finish(supernet, genome, batches(name, count=4)).model, batch))
    target = torch.stack(plain)
    assert (torch.stack(finished) - target).norm() < (torch.stack(nearest) - target).norm()


def test_what_was_finished_exports_verifies_and_weighs_the_same(tmp_path):
    supernet = supernet_of("bert", [*SCHEMES, "W8A8", "W8A8_STATIC", "FP8_DYNAMIC"], depth=[2, 3], mlp=[128, 256])
    genome = supernet.space.sample(1, seed=3)[0]
    finished = jointopt.finish(supernet, genome, batches("bert", count=4), quality=quality)
    assert finished.metrics is not None and finished.metrics["size"] == supernet.costs(genome)["size"]
    with supernet.active(genome) as view:
        assert quality(view) != finished.metrics["quality"]
    folder = jointopt.export(supernet, finished, tmp_path / "finished")
    verification = jointopt.verify(folder, quality=quality)
    assert verification.ok, verification.differences
    assert verification.metrics["quality"] == pytest.approx(finished.metrics["quality"], rel=1e-4)
    assert "GPTQ" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama_tied", "timm_resnet"])
def test_finished_sub_networks_of_other_families_export_too(name, tmp_path):
    supernet = supernet_of(name, [*SCHEMES, "W8A8_STATIC"])
    finished = jointopt.finish(supernet, supernet.space.sample(1, seed=5)[0], batches(name, count=2))
    verification = jointopt.verify(jointopt.export(supernet, finished, tmp_path / "finished"))
    assert verification.ok, verification.differences


@pytest.mark.parametrize("format", ["BNB_INT8", "BNB_NF4"])
def test_learned_rounding_leaves_layers_that_multiply_codes_to_gptq(format):
    supernet = supernet_of("bert", [format], preset="fixed")
    models = [
        jointopt.finish(supernet, supernet.space.largest, batches("bert", count=1), how).model
        for how in ("gptq", "learned")
    ]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    same = all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert same == (format == "BNB_INT8")


@pytest.mark.parametrize("name", ["bert", "llama_tied", "timm_vit", "timm_resnet", "resnet"])
def test_learned_rounding_exports_with_the_codes_that_it_learned(name, tmp_path):
    supernet = supernet_of(name, ["W4A4", "W8A8", "W4A16_CHANNEL"])
    genome, given = supernet.space.sample(1, seed=5)[0], batches(name, count=1)
    before = supernet.fingerprint()
    finished = jointopt.finish(supernet, genome, given, "learned")
    rounded = jointopt.finish(supernet, genome, given, "gptq")
    assert supernet.fingerprint() == before
    same = [torch.equal(a, b) for a, b in zip(finished.model.parameters(), rounded.model.parameters(), strict=True)]
    assert not all(same)
    verification = jointopt.verify(jointopt.export(supernet, finished, tmp_path / "finished"))
    assert verification.ok, verification.differences


def test_finishing_leaves_the_super_network_as_it_was_and_gives_the_same_again():
    supernet = supernet_of("llama_tied", SCHEMES)
    genome, batch = supernet.space.sample(1, seed=0)[0], batches("llama_tied", seed=1)[0]
    before, seen = supernet.fingerprint(), logits(supernet.extract(genome), batch)
    first = jointopt.finish(supernet, genome, batches("llama_tied"))
    second = jointopt.finish(supernet, genome, batches("llama_tied"))
    assert supernet.fingerprint() == before
    assert torch.equal(logits(supernet.extract(genome), batch), seen)
    for mine, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_batches_are_summed_whatever_way_they_are_cut():
    supernet = supernet_of("vit", ["W4A16"])
    whole = batches("vit", count=1, size=12)
    halves = [{"pixel_values": half} for half in whole[0]["pixel_values"].split(6)]
    one = jointopt.finish(supernet, supernet.space.largest, whole).model
    two = jointopt.finish(supernet, supernet.space.largest, halves).model
    # Sums are equal to the bit; of other numbers of rows a matrix product may differ in the last one.
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_padding_does_not_count():
    supernet = supernet_of("bert", ["W4A16"])
    padded = batches("bert", count=2)
    other = [
        {**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], b["input_ids"].flip(0))}
        for b in padded
    ]
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(padded, other, strict=True))
    one = jointopt.finish(supernet, supernet.space.largest, padded).model
    two = jointopt.finish(supernet, supernet.space.largest, other).model
    batch = batches("bert", seed=1)[0]
    torch.testing.assert_close(logits(one, batch), logits(two, batch), atol=1e-4, rtol=1e-4)


def test_an_unquantized_sub_network_is_finished_as_it_is():
    supernet = supernet_of("llama_tied", ["none", "W4A16"])
    chosen = supernet.space.decode(supernet.space.largest)
    genome = supernet.space.encode({k: "none" if k.endswith(".precision") else v for k, v in chosen.items()})
    batch = batches("llama_tied", seed=1)[0]
    finished = jointopt.finish(supernet, genome, batches("llama_tied"))
    assert torch.equal(logits(finished.model, batch), logits(supernet.extract(genome), batch))


def test_what_cannot_be_done_names_the_layer_or_what_is_allowed():
    supernet = supernet_of("vit", SCHEMES)
    genome = supernet.space.largest
    with pytest.raises(JointoptError, match="'gptqq'; did you mean 'gptq'"):
        jointopt.finish(supernet, genome, batches("vit"), rounding="gptqq")
    with pytest.raises(JointoptError, match="found no batch"):
        jointopt.finish(supernet, genome, [])
    broken = [{"pixel_values": torch.full((2, 3, 16, 16), torch.nan)}]
    with pytest.raises(JointoptError, match="vit.embeddings.patch_embeddings.projection: .* not finite"):
        jointopt.finish(supernet, genome, broken)


class TwoWays(nn.Module):
    """Two layers in the order that the input says, and one that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, turned):
        return self.first(self.second(x)) if turned else self.second(self.first(x))


def test_passes_that_reach_the_layers_in_another_order_do_not_wait_for_each_other():
    model = TwoWays()
    seen = []
    passes = [starting({"x": torch.ones(1, 2), "turned": turned}) for turned in (False, True, False)]
    in_step(model, passes, ["first", "second", "never"], lambda path, _, arrived: seen.append((path, len(arrived))))
    assert seen == [("first", 2), ("second", 3)]
    assert "forward" not in vars(model.first)


def test_an_original_beside_is_seen_as_it_was():
    model, original = TwoWays(), TwoWays()
    original.load_state_dict(model.state_dict())
    x, seen = torch.ones(1, 2), {}

    def change(path, module, arrived):
        seen[path] = arrived[0]
        nn.init.zeros_(module.weight)

    in_step(model, [starting({"x": x, "turned": False})], ["first", "second"], change, original)
    assert seen["first"].x is x and seen["first"].original_x is x
    assert torch.equal(seen["second"].x[0], model.first.bias)
    assert torch.equal(seen["second"].original_x, original.first(x))


@pytest.mark.parametrize(
    ("where", "error", "said"), [("change", JointoptError, "stop"), ("forward", RuntimeError, "shapes cannot be mult")]
)
def test_an_error_in_the_middle_ends_every_pass(where, error, said):
    model = TwoWays()

    def change(path, module, arrived):
        if where == "change":
            raise JointoptError("stop")

    passes = [
        starting({"x": torch.ones(1, 2), "turned": False}),
        starting({"x": torch.ones(1, 3 if where == "forward" else 2), "turned": 0}),
    ]
    with pytest.raises(error, match=said):
        in_step(model, passes, ["first", "second"], change)
    assert "forward" not in vars(model.second)


def test_a_layer_that_changes_its_class_computes_as_the_new_one_at_once():
    model = TwoWays()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    outputs = []
    model.second.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    expected = model.second(2 * model.first(torch.ones(1, 2)))

    def change(path, module, arrived):
        if path == "first":
            module.__class__ = Doubled

    in_step(model, [starting({"x": torch.ones(1, 2), "turned": False})], ["first"], change)
    assert torch.equal(outputs[-1], expected)


def distance(model: nn.Module) -> float:
    """How far from the unquantized model, to be kept small."""
    batch = batches("bert", count=1, seed=3)[0]
    return float((logits(model, batch) - logits(make("bert"), batch)).square().mean())


def test_the_top_of_the_front_is_finished_once_and_the_better_is_chosen():
    supernet = supernet_of("bert", ["W4A16", "W8A16"], preset="fixed")
    study = jointopt.search(supernet, lambda model: {"far": distance(model)}, [{"far": "min"}, "size"], 12, seed=0)
    scored = []

    def quality(model: nn.Module) -> dict[str, float]:
        scored.append(model)
        return {"far": distance(model)}

    seen = batches("bert", count=4)
    wanted = {"size_mb": float(study.front()["size"].median()) / 1e6}
    genome, finished = finish_top(supernet, study, seen, quality, wanted, top=3)
    assert len(scored) == len(study.finished()) == min(3, len(study.front()))
    records = {tuple(record["genome"]): record["metrics"] for record in study.finished()}
    assert tuple(study.best(**wanted)) in records
    assert finished is not None and records[tuple(genome)] == finished.metrics
    assert finished.metrics["far"] <= study.results(genome[None])[0]["far"]
    again, made = finish_top(supernet, study, seen, quality, wanted, top=3)
    assert len(scored) == len(records) and np.array_equal(again, genome) and made.metrics == finished.metrics
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), finished.model.parameters(), strict=True))


def test_a_cost_of_one_s_own_does_not_decide_which_is_better():
    supernet = supernet_of("bert", ["W4A16", "W8A16"], preset="fixed")
    mine = Objective("mine", "min", compute=lambda genomes: -genomes.sum(1) + 0.0)
    study = jointopt.search(supernet, lambda model: {"far": distance(model)}, [mine, {"far": "min"}, "size"], 6, seed=0)
    genome, finished = finish_top(supernet, study, batches("bert"), lambda model: {"far": 0.0}, {"knee": True}, top=1)
    assert finished is not None and finished.metrics["far"] == 0 < study.results(genome[None])[0]["far"]
    _, finished = finish_top(
        supernet, study, batches("bert"), lambda model: {"far": 1e9}, {}, Finishing("descent"), top=1
    )
    assert finished is None


def test_what_is_chosen_in_the_end_is_finished_though_finishing_moves_the_knee():
    supernet = supernet_of("bert", ["W4A16"], depth=[1, 2, 3], mlp=[64, 128, 192, 256])

    def small_ones_are_far(model: nn.Module) -> dict[str, float]:
        return {"far": sum(each.numel() for each in model.parameters()) ** -2.0}

    study = jointopt.search(supernet, small_ones_are_far, [{"far": "min"}, "size"], 30, seed=0)
    before = study.best(knee=True)
    genome, finished = finish_top(supernet, study, batches("bert"), lambda model: {"far": 0.0}, {"knee": True}, top=1)
    assert not np.array_equal(genome, before) and np.array_equal(genome, study.best(knee=True, finished="gptq"))
    assert finished is not None and np.array_equal(finished.genome, genome)
    assert study.finished_metrics(genome, "gptq") == finished.metrics


def test_where_the_first_quality_stays_the_next_one_decides_whether_finishing_is_better():
    known = [Objective("accuracy", "max"), Objective("kl", "min")]
    before = {"accuracy": 0.75, "kl": 0.5}
    assert improves({"accuracy": 0.75, "kl": 0.25}, before, known)
    assert not improves({"accuracy": 0.75, "kl": 0.5}, before, known)
    assert not improves({"accuracy": 0.5, "kl": 0.25}, before, known)
    assert improves({"accuracy": 1.0, "kl": 0.75}, before, known)


def test_a_finished_one_that_is_worse_is_not_exported():
    supernet = supernet_of("bert", ["W4A16", "W8A16"], preset="fixed")
    study = jointopt.search(supernet, lambda model: {"far": distance(model)}, [{"far": "min"}, "size"], 6, seed=0)
    wanted = {"knee": True}
    genome, finished = finish_top(supernet, study, batches("bert"), lambda model: {"far": 1e9}, wanted, top=2)
    assert finished is None and np.array_equal(genome, study.best(**wanted))
    assert len(study.finished()) == min(2, len(study.front()))


def test_only_what_keeps_to_the_constraints_is_finished():
    supernet = supernet_of("bert", ["W4A16", "W8A16"], preset="fixed")
    limit = supernet.costs(supernet.space.largest)["size"] * 0.9
    study = jointopt.search(
        supernet,
        lambda model: {"far": distance(model)},
        [{"far": "min"}, "macs"],
        12,
        seed=0,
        constraints={"size": f"<= {limit}"},
    )
    chosen, _ = finish_top(supernet, study, batches("bert"), lambda model: {"far": distance(model)}, {}, top=3)
    sizes = [supernet.costs(record["genome"])["size"] for record in study.finished()]
    assert max(sizes) <= limit
    assert chosen.tolist() in [record["genome"] for record in study.finished()]


def test_finishing_goes_on_from_weights_that_were_rotated_and_repaired():
    model = make("llama_tied")
    space = SearchSpace.for_model(model, schemes=["W4A16", "W4A8"], mlp=[128, 256], heads=[2, 4])
    supernet = Supernet(model, space, transforms=("rotate",), repair=True)
    supernet.calibrate(batches("llama_tied", count=4))
    batch, genome = batches("llama_tied", seed=1)[0], supernet.space.smallest
    target = logits(supernet.view(replace(supernet.plan(genome), schemes={})), batch)
    finished = logits(jointopt.finish(supernet, genome, batches("llama_tied", count=4)).model, batch)
    assert (finished - target).norm() < (logits(supernet.extract(genome), batch) - target).norm()


def test_a_bfloat16_model_is_finished_by_descent_with_its_embedding_and_exports(tmp_path):
    model = make("llama_tied").to(torch.bfloat16)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["NVFP4", "W4A16"], preset="fixed"))
    supernet.calibrate(batches("llama_tied"))
    finished = jointopt.finish(supernet, supernet.space.smallest, batches("llama_tied", count=4), "descent")
    assert all(hasattr(finished.model.get_submodule(path), "quantized") for path in ("model.embed_tokens", "lm_head"))
    verification = jointopt.verify(jointopt.export(supernet, finished, tmp_path / "finished"))
    assert verification.ok, verification.differences


@pytest.mark.parametrize("name", ["vit", "bert", "llama_tied", "resnet", "timm_vit"])
def test_training_alone_brings_a_sub_network_nearer_to_the_original_than_rounding_did(name):
    supernet = supernet_of(name, ["W4A16", "W8A8", "FP8_DYNAMIC", "MXFP4"])
    genome, data = supernet.space.smallest, batches(name, count=3)
    before = supernet.fingerprint()
    finished = jointopt.finish(supernet, genome, data, steps=25, learning_rate=1e-3)
    assert finished.rounding.startswith("trained-25-") and supernet.fingerprint() == before
    with supernet.original() as original, supernet.active(genome) as view:
        target, plain, trained = (
            torch.cat([logits(m, batch) for batch in data]).log_softmax(-1) for m in (original, view, finished.model)
        )
    divergence = [float(nn.functional.kl_div(each, target, log_target=True)) for each in (plain, trained)]
    assert divergence[1] < divergence[0]


def test_what_was_trained_alone_exports_with_the_codes_that_it_was_trained_with(tmp_path):
    schemes = ["W4A16", "W8A8", "W8A8_STATIC", "FP8", "NVFP4A16"]
    supernet = supernet_of("llama_tied", schemes, depth=[2, 3], mlp=[128, 256], caches=["INT8", "none"])
    genome = supernet.space.sample(1, seed=3)[0]
    finished = jointopt.finish(supernet, genome, batches("llama_tied", count=2), steps=3, quality=tokens_quality)
    assert finished.metrics is not None and finished.metrics["size"] == supernet.costs(genome)["size"]
    folder = jointopt.export(supernet, finished, tmp_path / "trained")
    verification = jointopt.verify(folder, quality=tokens_quality)
    assert verification.ok, verification.differences
    assert verification.metrics["quality"] == pytest.approx(finished.metrics["quality"], rel=1e-4)
    assert "trained for 3 steps" in (folder / "README.md").read_text()


def tokens_quality(model: nn.Module) -> float:
    return float(logits(model, batches("llama_tied", seed=3)[0]).square().mean())


def test_training_alone_gives_the_same_again_and_another_for_another_seed():
    supernet = supernet_of("vit", ["W8A8"])
    first, again, other = (
        jointopt.finish(supernet, supernet.space.smallest, batches("vit", count=4), steps=6, seed=seed).model
        for seed in (0, 0, 1)
    )
    probe = batches("vit", seed=2)[0]
    assert torch.equal(logits(first, probe), logits(again, probe))
    assert not torch.equal(logits(first, probe), logits(other, probe))


def test_impossible_trainings_of_one_sub_network_are_refused():
    supernet = supernet_of("vit", ["W8A8"])
    for match, options in {
        "finish: steps: found 0": {"steps": 0},
        "learning_rate: found 0; allowed: above 0": {"steps": 3, "learning_rate": 0},
        "learning_rate: found inf": {"steps": 3, "learning_rate": float("inf")},
        "seed: found -1; allowed: a whole number from 0": {"steps": 3, "seed": -1},
        "quality: found 3; allowed: a function": {"quality": 3},
        "found batches in a dict": {"steps": 3, "batches": batches("vit")[0]},
        "finish: found no batch; allowed: one or more": {"steps": 3, "batches": []},
        "a function of epochs": {"batches": lambda epoch: batches("vit")},
    }.items():
        with pytest.raises(JointoptError, match=match):
            jointopt.finish(supernet, supernet.space.smallest, **{"batches": batches("vit"), **options})


@pytest.mark.parametrize("options", [{}, {"steps": 2}], ids=["rounded", "trained"])
def test_batches_may_be_arrays_with_labels_from_whatever_gives_them_as_often_as_is_needed(options):
    supernet = supernet_of("timm_vit", ["W4A16"])
    given = batches("timm_vit")
    arrays = [{"x": batch["x"].numpy(), "labels": np.zeros(6)} for batch in given]
    once = (lambda epoch: iter(arrays)) if options else iter(arrays)
    plain = (lambda epoch: given) if options else given
    first, second = (jointopt.finish(supernet, supernet.space.largest, each, **options).model for each in (once, plain))
    assert torch.equal(logits(first, given[0]), logits(second, given[0]))


@pytest.mark.parametrize("options", [{}, {"steps": 2}], ids=["rounded", "trained"])
def test_batches_that_are_no_dicts_are_refused_by_their_type(options):
    supernet = supernet_of("vit", ["W4A16"])
    tuples = [(batch["pixel_values"], torch.zeros(6)) for batch in batches("vit")]
    for given, found in ((tuples, "a batch of type tuple; allowed: dicts"), (5, "a int"), (None, "a NoneType")):
        with pytest.raises(JointoptError, match=f"finish: found .*{found}"):
            jointopt.finish(supernet, supernet.space.largest, given, **options)


def test_a_trained_super_network_teaches_what_the_original_does_not_know():
    supernet = supernet_of("vit", ["W8A8"])
    data = [{**batch, "labels": torch.arange(6) % 5} for batch in batches("vit", count=2)]
    jointopt.train_supernet(supernet, data, 20, learning_rate=3e-3)
    supernet.calibrate(batches("vit", count=2))
    finished = jointopt.finish(supernet, supernet.space.smallest, data, steps=20, learning_rate=1e-3)
    whole = supernet.training_view(supernet.space.largest).eval()
    with supernet.original() as original:
        given, learned, found = (
            torch.cat([logits(m, {"pixel_values": batch["pixel_values"]}) for batch in data]).log_softmax(-1)
            for m in (original, whole, finished.model)
        )
    distances = [float(nn.functional.kl_div(found, each, log_target=True)) for each in (learned, given)]
    assert distances[0] < distances[1]


@pytest.mark.parametrize("rounding", ["gptq", "descent", "learned"])
def test_what_was_rounded_in_inference_mode_may_be_trained_afterwards(rounding):
    model, data, found = make("bert"), batches("bert"), []
    for mode in (torch.no_grad, torch.inference_mode):
        supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W4A8"]))
        supernet.calibrate(data)
        with mode():
            made_here = [{name: each.clone() for name, each in batch.items()} for batch in data]
            found.append(jointopt.finish(supernet, supernet.space.smallest, made_here, rounding).model)
    plain, other = (logits(each, data[0]) for each in found)
    assert torch.equal(plain, other)
    found[1](**data[0]).logits.sum()


def test_inference_mode_around_calibration_and_training_changes_nothing():
    model, data, found = make("bert"), batches("bert"), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]), repair=True)
            supernet.calibrate(data)
            finished = jointopt.finish(supernet, supernet.space.smallest, data, steps=2).model
        with supernet.active(supernet.space.smallest) as view:
            found.append([logits(each, data[0]) for each in (view, finished)])
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)
