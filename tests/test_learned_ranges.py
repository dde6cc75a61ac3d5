"""Learned ranges: their gradients are LSQ's, and what they end in is what is scored and exported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import jointopt
from jointopt import ElasticTrainer, JointoptError, Recipe, SearchSpace, Supernet
from jointopt.names import LEARNED_RANGES
from jointopt.supernet.subnetwork import renaming
from jointopt.training import loop
from jointopt.training.distillation import soft_labels
from quant.calibration import choose_clip
from quant.formats import Format, scheme
from quant.learned_ranges import LEAST, ends, factors, learn_range, widened
from quant.reference import grouped_view, quantize, round_to_format
from quant.tensors import QuantizedTensor
from tests.elastic_trainers import arguments, data
from tests.same import same_codes
from tests.test_training import calibrated, labelled
from tests.zoo import batches, logits, make

FORMATS = {
    "int4 groups": Format("int4", "group", 32),
    "int8 rows": Format("int8", "channel"),
    "int4 with a zero point": Format("int4", "group", 32, symmetric=False),
    "int8 rows with a zero point": Format("int8", "channel", symmetric=False),
    "fp8 tensor": Format("fp8_e4m3", "tensor"),
    "fp8 rows": Format("fp8_e5m2", "channel"),
    "fp4 groups": Format("fp4_e2m1", "group", 32),
    "nvfp4": Format("fp4_e2m1", "group", 16, scale="e4m3"),
    "mxfp4": Format("fp4_e2m1", "group", 32, scale="e8m0"),
}
RECIPE = Recipe(precision_from=0.0, learned_ranges=True)


def passed(x: Tensor, rounded: Tensor) -> Tensor:
    """The paper's `roundpass`."""
    return x + (rounded - x).detach()


def by_autograd(weight: Tensor, quantized: QuantizedTensor, factor: Tensor) -> Tensor:
    """Algorithm 1 of LSQ in torch, with the gradients of autograd; what is stored are the scales of this factor."""
    form, kind = quantized.format, quantized.format.kind
    groups = grouped_view(weight.flatten(1), form)
    stored = quantized.effective_scale().reshape(*groups.shape[:2], 1)
    scaled = factor / math.sqrt(weight.numel() * len(factor) / factor.numel() * kind.max)
    factor = factor.detach() + scaled - scaled.detach()  # the paper's `gradscale`
    change = (factor / factor.detach())[..., None]
    if quantized.zero_point is None:
        step, shift = stored * change[0], torch.zeros(())
    else:
        zero = quantized.zero_point.float().reshape(stored.shape)
        low, high = (kind.min - zero) * stored * change[0], (kind.max - zero) * stored * change[1]
        step = (high - low) / (kind.max - kind.min)
        shift = passed(kind.min - low / step, zero)
    clipped = (groups / step + shift).clamp(kind.min, kind.max)
    return ((passed(clipped, round_to_format(clipped.detach(), form.element)) - shift) * step).reshape(weight.shape)


@pytest.mark.parametrize("shared", [False, True], ids=["a factor a scale", "one factor"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_gradients_are_those_of_the_paper(form, shared):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator).requires_grad_(True)
    clip = choose_clip(weight, form)
    shape = (ends(form), 1, 1) if shared else (ends(form), *clip[0].shape)
    factor = (0.4 + 0.5 * torch.rand(shape, generator=generator)).requires_grad_(True)
    quantized = quantize(weight, form, widened(clip, factor.detach()))
    arriving = torch.randn(8, 64, generator=generator)
    found = torch.autograd.grad(
        learn_range(weight, quantized.dequantize(), quantized, factor), (weight, factor), arriving
    )
    expected = torch.autograd.grad(by_autograd(weight, quantized, factor), (weight, factor), arriving)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert (found[0] == 0).any() and (found[1] != 0).all()


def test_a_range_never_shrinks_to_nothing():
    assert factors(torch.full((1, 1, 1), -3.0), 64) == LEAST
    assert factors(torch.zeros(1), 64) == 1


def trained(name: str, schemes: list[str], steps: int = 6, **options) -> Supernet:
    supernet = calibrated(name, schemes=schemes)
    jointopt.train_supernet(supernet, labelled(name), steps, recipe=RECIPE, learning_rate=3e-3, **options)
    supernet.calibrate(batches(name))
    return supernet


@pytest.mark.parametrize("name", ["vit", "llama_tied", "resnet"])
def test_before_a_step_nothing_is_another(name):
    static = ["W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8"]
    supernet = calibrated(name, schemes=["W4A16", "W8A8", "NVFP4", "W8A8_ASYM_BOTH", *static])
    genomes, batch = supernet.space.sample(3, seed=0), batches(name)[0]
    before = [logits(supernet.training_view(genome, precision=True).eval(), batch) for genome in genomes]
    supernet.learn_ranges()
    for genome, expected in zip(genomes, before, strict=True):
        assert torch.equal(logits(supernet.training_view(genome, precision=True).eval(), batch), expected)


@pytest.mark.parametrize("name", ["vit", "bert", "llama_tied", "resnet", "timm_vit"])
def test_what_is_trained_is_what_the_search_scores_and_the_export_holds(name, tmp_path):
    supernet = trained(name, ["W4A16", "W8A8", "FP8", "W8A8_STATIC_ASYM", "NVFP4A16", "MXFP4A16"])
    assert supernet.learned is not None and LEARNED_RANGES not in supernet.model.state_dict()
    whole = supernet.plan(supernet.space.largest).schemes
    learned = [supernet.learned.factor(path, each) for path, each in whole.items()]
    assert max(float((factor - 1).abs().max()) for factor in learned) > 0.01
    genome, batch = supernet.space.sample(1, seed=2)[0], batches(name)[0]
    with supernet.active(genome) as view:
        seen = logits(view, batch)
        layers = {path: module.quantized for path, module in view.named_modules() if hasattr(module, "quantized")}
        inputs = {path: module.input_scale for path, module in view.named_modules() if hasattr(module, "quantized")}
        if name != "resnet":  # whose BatchNorm statistics are estimated anew for what is scored
            assert torch.equal(logits(supernet.training_view(genome, precision=True).eval(), batch), seen)
    folder = jointopt.export(supernet, genome, tmp_path / "exported")
    stored = load_file(folder / "model.safetensors")
    scales = {path: stored[f"{path}.weight_scale"] for path in layers if f"{path}.weight_scale" in stored}
    assert scales
    for path, scale in scales.items():
        assert torch.equal(scale.float().flatten(), layers[path].scale.float().flatten())
    for path, scale in inputs.items():
        if f"{path}.input_scale" in stored:
            assert torch.equal(stored[f"{path}.input_scale"].float().flatten(), scale.float())
    verification = jointopt.verify(folder)
    assert verification.ok, verification.differences


def test_slices_of_one_width_and_another_share_a_factor():
    supernet = trained("bert", ["W8A8", "W4A16_ASYM"])
    assert supernet.learned is not None
    for genome in supernet.space.sample(4, seed=5):
        plan = supernet.plan(genome)
        view, renamed = supernet.built(plan), renaming(supernet.family, plan)
        for path, each in plan.schemes.items():
            held = view.get_submodule(renamed(path)).quantized
            weight = supernet.model.get_submodule(path).weight.detach()[:, : held.codes.shape[1]]
            factor = supernet.learned.factor(path, each)
            expected = quantize(weight, each.weights, widened(choose_clip(weight, each.weights), factor))
            assert same_codes(held, expected.sliced(*held.codes.shape))


def test_a_saved_super_network_keeps_its_ranges(tmp_path):
    supernet = trained("vit", ["W4A16", "W8A8"])
    supernet.save(tmp_path / "supernet.safetensors")
    plain = calibrated("vit", schemes=["W4A16", "W8A8"])
    again = Supernet(make("vit"), SearchSpace.for_model(make("vit"), schemes=["W4A16", "W8A8"]))
    again.load(tmp_path / "supernet.safetensors")
    again.calibrate(batches("vit"))
    assert again.fingerprint() == supernet.fingerprint()
    again.learned.values += 0.01
    assert again.fingerprint() != supernet.fingerprint()
    plain.save(tmp_path / "plain.safetensors")
    again.load(tmp_path / "plain.safetensors")
    assert again.learned is None


def test_ranges_in_training_have_no_bytes():
    supernet = calibrated("vit", schemes=["W8A8_STATIC"])
    whole = supernet.costs(supernet.space.largest)
    fresh = calibrated("vit", schemes=["W8A8_STATIC"])
    fresh.learn_ranges()
    assert fresh.costs(fresh.space.largest) == whole


def test_a_file_that_is_refused_changes_nothing(tmp_path):
    supernet = trained("vit", ["W8A8_STATIC"])
    before = supernet.fingerprint()
    other = Supernet(make("vit"), supernet.space, transforms=["smooth"])
    other.calibrate(batches("vit"))
    other.save(tmp_path / "smooth.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "smooth.safetensors").read_bytes()[:20000])
    supernet.save(tmp_path / "own.safetensors")
    leaving = {stage: names[1:] for stage, names in supernet.leaving.items()}
    for name, record in {
        "list": [1],
        "bare": {"trained": True},
        "short": {"leaving": leaving, "trained": True},
    }.items():
        metadata = {"supernet": json.dumps(record)}
        save_file(load_file(tmp_path / "own.safetensors"), tmp_path / f"{name}.safetensors", metadata=metadata)
    for name, match in {
        "list": "list.safetensors: cannot be read: AttributeError: .*; allowed: what `save` wrote",
        "bare": "bare.safetensors: cannot be read: KeyError: 'leaving'",
        "short": "short.safetensors: not a saved super-network of this model",
        "smooth": "saved with transforms smooth",
        "torn": "torn.safetensors: cannot be read",
        "none": "none.safetensors: cannot be read",
    }.items():
        with pytest.raises(JointoptError, match=match):
            supernet.load(tmp_path / f"{name}.safetensors")
        assert supernet.fingerprint() == before and supernet.calibrated
    with pytest.raises(JointoptError, match="cannot be written"):
        supernet.save(tmp_path / "no folder" / "supernet.safetensors")


def test_a_training_of_ranges_that_was_killed_ends_with_the_same_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 4)
    items = labelled("bert", count=3)
    whole = calibrated("bert", schemes=["W4A16", "FP8"])
    jointopt.train_supernet(whole, items, 9, recipe=RECIPE, learning_rate=1e-3)

    def killed_at(epoch: int):
        if epoch == 2:
            raise InterruptedError
        return [items[index] for index in np.random.default_rng([0, epoch]).permutation(3)]

    file = tmp_path / "training.safetensors"
    options = {"recipe": RECIPE, "learning_rate": 1e-3, "checkpoint": file}
    with pytest.raises(InterruptedError):
        jointopt.train_supernet(calibrated("bert", schemes=["W4A16", "FP8"]), killed_at, 9, **options)
    resumed = calibrated("bert", schemes=["W4A16", "FP8"])
    jointopt.train_supernet(resumed, items, 9, **options)
    assert torch.equal(resumed.learned.values, whole.learned.values)


def test_the_trainer_trains_ranges_and_resumes_them_to_the_bit(tmp_path):
    def made(**options) -> ElasticTrainer:
        model = make("vit")
        space = SearchSpace.for_model(model, schemes=["W4A16", "FP8"])
        args = arguments(tmp_path, save_strategy="steps", save_steps=3, **options)
        return ElasticTrainer(model=model, space=space, args=args, train_dataset=data(), recipe=RECIPE)

    whole = made()
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(resumed.supernet.learned.values, whole.supernet.learned.values)
    assert resumed.supernet.fingerprint() == whole.supernet.fingerprint()


def test_sorting_again_leaves_ranges_with_their_layers():
    supernet = trained("vit", ["W8A16_CHANNEL"], sort_every=2)
    assert supernet.learned is not None
    plan, batch = supernet.plan(supernet.space.largest), batches("vit")[0]

    def factors_of_all() -> dict[str, Tensor]:
        return {path: supernet.learned.factor(path, scheme) for path, scheme in plan.schemes.items()}

    up = supernet.model.get_submodule("vit.layers.0.mlp.fc1")
    before, rows, outputs = factors_of_all(), up.weight.detach().clone(), logits(supernet.view(plan), batch)
    supernet.sort_again(batches("vit", seed=3))
    assert not torch.equal(up.weight, rows) and len({float(each) for each in before.values()}) > 1
    assert all(torch.equal(each, before[path]) for path, each in factors_of_all().items())
    torch.testing.assert_close(logits(supernet.view(plan), batch), outputs)


def test_what_was_finished_with_learned_ranges_exports_with_its_codes(tmp_path):
    schemes = ["W4A16", "W4A16_ASYM", "W8A8", "W8A8_STATIC", "FP8", "NVFP4A16"]
    supernet = calibrated("llama_tied", schemes=schemes, depth=[2, 3], mlp=[128, 256])
    genome = supernet.space.sample(1, seed=3)[0]
    items = batches("llama_tied", count=2)
    fixed, learned = (
        jointopt.finish(supernet, genome, items, steps=4, learning_rate=1e-3, learned_ranges=each)
        for each in (False, True)
    )
    assert learned.rounding.startswith("learned-4-")
    held = {path: module.quantized for path, module in learned.model.named_modules() if hasattr(module, "quantized")}
    others = {path: module.quantized for path, module in fixed.model.named_modules() if hasattr(module, "quantized")}
    assert any(not torch.equal(each.scale.float(), others[path].scale.float()) for path, each in held.items())
    static = [path for path in held if learned.model.get_submodule(path).input_scale is not None]
    moved = [
        not torch.equal(*(each.model.get_submodule(path).input_scale for each in (fixed, learned))) for path in static
    ]
    assert any(moved)
    folder = jointopt.export(supernet, learned, tmp_path / "learned")
    stored = load_file(folder / "model.safetensors")
    for path, each in held.items():
        if f"{path}.weight_scale" in stored:
            assert torch.equal(stored[f"{path}.weight_scale"].float().flatten(), each.scale.float().flatten())
    verification = jointopt.verify(folder)
    assert verification.ok, verification.differences
    assert "ranges of their scales" in (folder / "README.md").read_text()


def digits() -> list[dict]:
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    return [{"pixel_values": images[at : at + 64], "labels": labels[at : at + 64]} for at in range(0, 1024, 64)]


def distance_from(model: nn.Module, inputs: list[dict]) -> Callable[[nn.Module], float]:
    """Gives a network's KL divergence from the model, averaged over batches."""

    def distance(found: nn.Module) -> float:
        return float(np.mean([soft_labels(logits(found, batch), logits(model, batch)) for batch in inputs]))

    return distance


def digits_vit_with_outliers(items: list[dict], seed: int = 0) -> ViTForImageClassification:
    """A small ViT trained on the digits, then given what makes large language models hard to round: a few channels
    whose normalization is 32 times as small and whose weights are as much larger, so that its function is the same."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(6):
        for batch in items:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
            optimizer.step()
    with torch.no_grad():
        for layer in model.vit.layers:
            attention, mlp = layer.attention, layer.mlp
            readers = {
                layer.layernorm_before: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.layernorm_after: (mlp.fc1,),
            }
            for norm, linears in readers.items():
                norm.weight[:4] /= 32
                norm.bias[:4] /= 32
                for each in linears:
                    each.weight[:, :4] *= 32
    return model.eval()


def test_learned_ranges_leave_less_of_the_loss_of_four_bits_than_fixed_ones():
    """Of each of three networks, and of all by some hundredths: how much is another with each course of training."""
    items = digits()
    inputs = [{"pixel_values": batch["pixel_values"]} for batch in items]
    totals = np.zeros(2)
    for seed in range(3):
        model = digits_vit_with_outliers(items, seed)
        supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W4A4"], preset="fixed"))
        supernet.calibrate(inputs[:2])
        distance = distance_from(model, inputs)
        with supernet.active(supernet.space.largest) as view:
            nearest = distance(view)
        fixed, learned = (
            distance(jointopt.finish(supernet, supernet.space.largest, inputs, steps=60, learned_ranges=each).model)
            for each in (False, True)
        )
        assert learned < fixed < nearest
        totals += fixed, learned
    assert totals[1] < 0.97 * totals[0]


def test_finishing_goes_on_from_the_ranges_of_the_super_network():
    supernet = trained("vit", ["W4A16"], steps=10)
    genome = supernet.space.smallest
    finished = jointopt.finish(supernet, genome, batches("vit"), steps=1, learning_rate=1e-30, learned_ranges=True)
    with supernet.active(genome) as view:
        for path, module in view.named_modules():
            if hasattr(module, "quantized"):
                assert same_codes(finished.model.get_submodule(path).quantized, module.quantized)


def test_rounding_by_gptq_keeps_to_the_learned_ranges():
    supernet = trained("vit", ["W8A8"], steps=10)
    finished = jointopt.finish(supernet, supernet.space.smallest, batches("vit"))
    with supernet.active(supernet.space.smallest) as view:
        for path, module in view.named_modules():
            if isinstance(module, nn.Linear) and hasattr(module, "quantized"):
                assert torch.equal(finished.model.get_submodule(path).quantized.scale, module.quantized.scale)


def test_bitsandbytes_formats_have_no_range_to_learn():
    supernet = calibrated("bert", schemes=["BNB_NF4"], preset="fixed")
    supernet.learn_ranges()
    path = next(iter(supernet.plan(supernet.space.largest).schemes))
    assert supernet.learned.factor(path, scheme("BNB_NF4")) is None


def test_what_cannot_be_learned_is_refused():
    supernet = calibrated("vit", schemes=["W4A16"])
    batch = labelled("vit")[0]
    model = make("vit")
    uncalibrated = Supernet(model, SearchSpace.for_model(model, schemes=["FP8"]))
    for match, call in {
        r"FP8 needs ranges of activations; call calibrate": uncalibrated.learn_ranges,
        r"learned_ranges: found no precision_from": lambda: Recipe(learned_ranges=True),
        r"call supernet\.learn_ranges\(\)": lambda: jointopt.elastic_loss(supernet, batch, 0, RECIPE),
        r"learned_ranges without steps": lambda: jointopt.finish(
            supernet, supernet.space.smallest, batches("vit"), learned_ranges=True
        ),
    }.items():
        with pytest.raises(JointoptError, match=match):
            call()


def test_in_a_loop_of_one_s_own_ranges_are_among_the_parameters():
    supernet = calibrated("vit", schemes=["W4A16"])
    supernet.learn_ranges()
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        jointopt.elastic_loss(supernet, labelled("vit")[0], step, RECIPE, 2).backward()
        optimizer.step()
    moved = supernet.learned.values.detach().clone()
    supernet.calibrate(batches("vit"))
    assert torch.equal(supernet.learned.values, moved) and not supernet.learned.values.requires_grad
    assert supernet.costs(supernet.space.smallest) == calibrated("vit", schemes=["W4A16"]).costs(
        supernet.space.smallest
    )
