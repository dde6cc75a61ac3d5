"""What an evaluation computes: forward passes on weights that were quantized once, and nothing that outlives it."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from jointopt import JointoptError, SearchSpace, Supernet, search
from jointopt.evaluation.evaluation import evaluate
from jointopt.supernet.batch_norm import SAMPLES
from jointopt.supernet.state import for_workers
from jointopt.supernet.weight_bank import BankedWeight, WeightBank
from quant.calibration import WEIGHT_METHODS, choose_clip
from quant.formats import ELEMENTS, SCHEMES, Element, Format, Scheme, own_definition
from quant.reference import quantize
from tests.zoo import batches, logits, make

ALL_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if not scheme.bitsandbytes)


def supernet_of(name: str, calibrated: bool = True, supernet: dict | None = None, **options) -> Supernet:
    model = make(name)
    options.setdefault("schemes", ALL_SCHEMES)
    found = Supernet(model, SearchSpace.for_model(model, **options), **(supernet or {}))
    if calibrated:
        found.calibrate(batches(name))
    return found


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "quantized" in module.__dict__}


@pytest.mark.parametrize("name", ["bert", "llama_tied", "timm_resnet"])
def test_the_values_that_are_scored_are_those_of_the_codes_that_are_exported(name):
    supernet = supernet_of(name)
    for genome in supernet.space.sample(8, seed=0):
        with supernet.active(genome) as view:
            extracted = supernet.extract(genome)
            for path, layer in quantized_layers(view).items():
                assert torch.equal(layer.quantized.dequantize(layer.weight.dtype), layer.weight)
                assert torch.equal(layer.weight, extracted.get_submodule(path).weight)


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_a_slice_of_a_banked_weight_is_the_quantized_slice(method):
    options = {"schemes": ["W8A16_CHANNEL", "W4A16", "W4A16_ASYM", "MXFP4A16"], "heads": [2, 4], "mlp": [128, 256]}
    supernet = supernet_of("llama_untied", supernet={"weight_calibration": method}, **options)
    seen = set()
    for genome in supernet.space.sample(3, seed=1):
        with supernet.active(genome) as view:
            for path, layer in quantized_layers(view).items():
                whole = supernet.model.get_submodule(path).weight
                weight = whole[: layer.weight.shape[0], : layer.weight.shape[1]].contiguous()
                form = layer.scheme.weights
                fresh = quantize(weight, form, choose_clip(weight, form, method))
                assert torch.equal(layer.quantized.codes, fresh.codes)
                assert torch.equal(layer.quantized.scale.view(torch.uint8), fresh.scale.view(torch.uint8))
                assert torch.equal(layer.weight, fresh.dequantize())
                seen.add((form.granularity, weight.shape[1] < whole.shape[1]))
    assert seen == {("channel", False), ("channel", True), ("group", False), ("group", True)}


def test_a_scale_of_the_whole_tensor_stays_that_in_its_slices():
    supernet = supernet_of("llama_untied", schemes=["NVFP4", "FP8"], heads=[2, 4], mlp=[128, 256])
    for genome in supernet.space.sample(6, seed=0):
        with supernet.active(genome) as view:
            for path, layer in quantized_layers(view).items():
                whole = quantize(supernet.model.get_submodule(path).weight, layer.scheme.weights)
                rows, columns = layer.weight.shape
                assert torch.equal(layer.weight, whole.dequantize()[:rows, :columns])


@pytest.mark.parametrize("limit", [1, 300_000, 10**9])
def test_a_small_bank_changes_what_is_held_but_no_output(limit):
    roomy, small = supernet_of("bert"), supernet_of("bert", supernet={"bank_bytes": limit})
    batch = batches("bert", seed=1)[0]
    for genome in roomy.space.sample(5, seed=0):
        with roomy.active(genome) as expected, small.active(genome) as view:
            assert torch.equal(logits(view, batch), logits(expected, batch))
        assert small._bank.nbytes <= limit or len(small._bank._held) == 1


def test_a_view_in_use_keeps_its_weights_when_the_bank_lets_them_go():
    supernet = supernet_of("bert", supernet={"bank_bytes": 1})
    first, *others = supernet.space.sample(4, seed=2)
    batch = batches("bert", seed=1)[0]
    with supernet.active(first) as view:
        before = logits(view, batch)
        for genome in others:
            with supernet.active(genome) as other:
                logits(other, batch)
        assert torch.equal(logits(view, batch), before)


def test_a_bank_a_little_too_small_for_a_sub_network_still_finds_most_of_it():
    supernet = supernet_of("bert", schemes=["none", "W8A8"])
    with supernet.active(supernet.space.smallest):
        pass
    banked = next(iter(supernet._bank._held.values()))
    scheme, made, small = SCHEMES["W8A8"], [], WeightBank(19 * banked.nbytes)

    def make() -> BankedWeight:
        made.append(1)
        return banked

    for _ in range(10):
        for layer in range(20):
            small.get(f"layer{layer}", scheme, None, make)
    assert small.nbytes == 19 * banked.nbytes and len(made) < 100


def test_workers_hold_what_they_share_and_no_more_than_their_part_beside_it():
    supernet = supernet_of("bert", supernet={"bank_bytes": 1_000_000})
    sent = for_workers(supernet, 3)
    shared = dict(sent._bank._shared)
    assert shared and sent._bank.limit == (1_000_000 - supernet._bank.nbytes) // 3
    for genome in supernet.space.sample(8, seed=0):
        with sent.active(genome):
            pass
    assert sent._bank._shared == shared
    assert sent._bank.nbytes <= sent._bank.limit or len(sent._bank._held) == 1
    assert not shared.keys() & sent._bank._held.keys()


def test_the_bank_counts_values_codes_and_scales():
    supernet = supernet_of("llama_untied")
    for genome in supernet.space.sample(5, seed=0):
        with supernet.active(genome):
            pass
    storages = {}
    for banked in supernet._bank._held.values():
        parts = [banked.quantized.codes, banked.quantized.scale, banked.quantized.zero_point]
        for tensor in [banked.values, *parts, banked.quantized.global_scale]:
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert supernet._bank.nbytes == sum(storages.values())


@pytest.mark.parametrize("name", ["bert", "vit", "llama_tied", "timm_resnet"])
def test_a_model_given_in_training_mode_is_evaluated_without_dropout(name):
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    supernet = Supernet(model, SearchSpace.for_model(model))
    supernet.calibrate(batches(name))
    batch = batches(name, seed=1)[0]

    def quality(view: nn.Module) -> float:
        assert not torch.is_grad_enabled() and not any(module.training for module in view.modules())
        return logits(view, batch).double().sum()

    genome = supernet.space.sample(1, seed=0)[0]
    first, second = (evaluate(supernet, genome, quality) for _ in range(2))
    assert first.failed is None and first.metrics == second.metrics
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "timm_resnet"])
def test_an_evaluation_leaves_the_super_network_as_it_was(name):
    supernet = supernet_of(name)
    before = supernet.fingerprint()
    for genome in supernet.space.sample(3, seed=0):
        assert evaluate(supernet, genome, lambda model: logits(model, batches(name)[0]).mean()).failed is None
    assert supernet.fingerprint() == before


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([[0.5]])])
def test_quality_is_a_number_of_any_make(value):
    supernet = supernet_of("bert")
    assert evaluate(supernet, supernet.space.smallest, lambda _: value).metrics["quality"] == 0.5


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.zeros(2), "returned Tensor for 'quality'; allowed: a number"),
        (np.bool_(True), "returned bool for 'quality'; allowed: a number"),
        ("0.5", "returned str for 'quality'; allowed: a number"),
        ({"accuracy": float("nan")}, "returned nan for 'accuracy'; allowed: a finite number"),
        ({"size": 3.0}, "returned 'size', which is a cost"),
        ({"seconds": 3.0}, "returned 'seconds', a column that every study has"),
        ({1: 0.5}, "returned 1 as the name of a metric; allowed: text"),
        ({}, "returned no metric"),
        ({"predicted_f1": 3.0}, "returned 'predicted_f1', a column that every study has"),
    ],
)
def test_what_is_no_metric_is_a_failure_with_its_reason(returned, said):
    supernet = supernet_of("bert")
    found = evaluate(supernet, supernet.space.smallest, lambda _: returned)
    assert found.metrics is None and said in found.failed


def test_a_failure_s_reason_is_the_first_line_that_says_something_and_what_it_announces():
    supernet = supernet_of("bert")
    found = evaluate(supernet, supernet.space.smallest, lambda _: np.testing.assert_allclose(0.5, 0.6))
    assert found.failed == "AssertionError: Not equal to tolerance rtol=1e-07, atol=0"
    found = evaluate(supernet, supernet.space.smallest, lambda _: nn.Linear(2, 2, bias=False).load_state_dict({}))
    said = 'Missing key(s) in state_dict: "weight".'
    assert found.failed == f"RuntimeError: Error(s) in loading state_dict for Linear: {said}"


def test_a_function_that_ends_the_process_has_failed():
    supernet = supernet_of("bert")
    found = evaluate(supernet, supernet.space.smallest, lambda _: sys.exit(0))
    assert found.metrics is None and found.failed == "SystemExit: 0"


def test_a_gpu_that_is_lost_ends_the_search_and_the_same_call_goes_on(tmp_path):
    supernet, calls = supernet_of("bert"), []

    def quality(model: nn.Module) -> float:
        calls.append(model)
        if len(calls) == 4:  # from then on each call of the process would raise it
            raise torch.AcceleratorError("CUDA error: device-side assert triggered\nKernel errors might be ...")
        return float(logits(model, batches("bert")[0]).square().mean())

    options: dict = {"evaluations": 8, "storage": tmp_path / "study.db", "seed": 0}
    with pytest.raises(JointoptError, match="quality: AcceleratorError: CUDA error: .* a new process goes on"):
        search(supernet, quality, **options)
    study = search(supernet, quality, **options)
    assert len(study) == 8 and study.evaluations()["failed"].isna().all()


def test_a_signal_handler_that_ends_the_process_ends_it_in_an_evaluation_too():
    supernet = supernet_of("bert")
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
    try:
        with pytest.raises(SystemExit, match="3"):
            evaluate(supernet, supernet.space.smallest, lambda _: signal.raise_signal(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)


def halved(model: nn.Module) -> float:
    model.to(torch.bfloat16)
    return 1.0


def scaled_before_it_failed(model: nn.Module) -> float:
    next(model.parameters()).mul_(0.9)
    raise ValueError


def halved_where_pruned(model: nn.Module) -> float:
    return halved(model) if len(model.bert.encoder.layer) < 4 else 1.0


@pytest.mark.parametrize("quality", [halved, scaled_before_it_failed, halved_where_pruned])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_that_writes_to_the_weights_ends_the_search(quality, workers):
    supernet = supernet_of("bert")
    with pytest.raises(JointoptError, match="quality changed weights that sub-networks share: bert"):
        search(supernet, quality, evaluations=10, workers=workers)


def settings_of(model: nn.Module) -> tuple:
    return model.config.use_cache, model.config._attn_implementation, model.generation_config.max_new_tokens


def with_settings_of_its_own(model: nn.Module) -> float:
    found = settings_of(model)
    model.config.use_cache, model.generation_config.max_new_tokens = False, 7
    model.set_attn_implementation("eager")
    return float(found[:2] == (True, "sdpa") and found[2] is None)


def test_what_the_function_sets_in_a_model_s_configs_is_set_in_no_other():
    model = make("llama_tied")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"])
    supernet = Supernet(model, space)
    supernet.calibrate(batches("llama_tied"))
    before = settings_of(model)
    study = search(supernet, with_settings_of_its_own, evaluations=4, strategy="random")
    assert set(study.evaluations()["quality"]) == {1.0}
    assert settings_of(model) == settings_of(supernet.model) == before


def test_gradients_that_the_function_computes_are_left_on_no_model():
    model = make("bert")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed"))
    supernet.calibrate(batches("bert"))
    model.classifier.bias.grad = torch.ones(3)

    def sensitivity(view: nn.Module) -> float:
        with torch.enable_grad():
            view(**batches("bert")[0]).logits.square().sum().backward()
        return float(view.classifier.bias.grad.norm())

    search(supernet, sensitivity, evaluations=3, seed=0)
    left = {name for each in (model, supernet.model) for name, p in each.named_parameters() if p.grad is not None}
    assert left == {"classifier.bias"} and torch.equal(model.classifier.bias.grad, torch.ones(3))
    assert supernet.model.classifier.bias.grad is None


def test_what_the_function_freezes_is_trainable_again():
    model = make("bert")
    model.classifier.bias.requires_grad_(False)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed"))
    supernet.calibrate(batches("bert"))
    search(supernet, lambda view: float(view.requires_grad_(False)(**batches("bert")[0]).logits.sum()), evaluations=3)
    frozen = {name for each in (model, supernet.model) for name, p in each.named_parameters() if not p.requires_grad}
    assert frozen == {"classifier.bias"}


def test_a_model_that_the_function_moved_to_another_dtype_is_as_it_was():
    model = make("bert")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(batches("bert"))
    with pytest.raises(JointoptError, match="quality changed weights"):
        search(supernet, halved, evaluations=10)
    for name, each in model.state_dict().items():
        assert each.dtype == before[name].dtype and torch.equal(each, before[name]), name
    assert search(supernet, lambda _: 1.0, evaluations=2).evaluations()["failed"].isna().all()


@pytest.mark.parametrize(("size", "samples"), [(300, SAMPLES), (50, 150), (96, 192), (140, SAMPLES)])
def test_batch_norm_is_estimated_from_the_first_batches_each_sample_alike(size, samples):
    images = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    supernet = supernet_of("timm_resnet", calibrated=False, schemes=["none"])
    supernet.calibrate([{"x": part} for part in images.split(size)])
    with supernet.active(supernet.space.smallest) as view, torch.no_grad():
        expected = view.conv1(images[:samples]).mean((0, 2, 3))
    torch.testing.assert_close(view.bn1.running_mean, expected, atol=1e-6, rtol=1e-4)


def test_a_short_last_batch_counts_by_its_samples():
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    supernet = supernet_of("timm_resnet", calibrated=False, schemes=["none"])
    supernet.calibrate([{"x": part} for part in images.split(18)])
    with supernet.active(supernet.space.smallest) as view, torch.no_grad():
        expected = view.conv1(images).mean((0, 2, 3))
    torch.testing.assert_close(view.bn1.running_mean, expected, atol=1e-6, rtol=1e-4)


def test_batch_norm_is_estimated_from_copies_of_the_batches():
    supernet = supernet_of("timm_resnet", calibrated=False, schemes=["none"])
    given = batches("timm_resnet")
    supernet.calibrate(given)
    before = supernet.extract(supernet.space.smallest).state_dict()
    for batch in given:
        batch["x"].zero_()
    after = supernet.extract(supernet.space.smallest).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batch_norm_without_calibration_is_refused():
    supernet = supernet_of("timm_resnet", calibrated=False, schemes=["none"])
    with pytest.raises(JointoptError, match="BatchNorm.*calibrate"):
        supernet.extract(supernet.space.smallest)


def test_super_networks_with_other_sub_networks_have_another_fingerprint():
    same = [supernet_of("timm_resnet", schemes=["none"]) for _ in range(2)]
    assert same[0].fingerprint() == same[1].fingerprint()
    same[1].calibrate([{"x": batch["x"] * 1.5} for batch in batches("timm_resnet")])
    assert same[0].fingerprint() != same[1].fingerprint()
    clipped = supernet_of("bert", supernet={"weight_calibration": "mse"})
    assert supernet_of("bert").fingerprint() != clipped.fingerprint()


def test_last_bits_of_calibrated_ranges_are_not_of_the_fingerprint():
    """A study goes on on another kind of CPU, which sums up otherwise."""
    one = supernet_of("vit", schemes=["none", "W8A8_STATIC", "NVFP4"])
    before, constants = one.fingerprint(), next(iter(one._measured_constants.values()))
    for each in constants.values():
        each.mul_(1 + 2**-22)
    assert one.fingerprint() == before
    other = supernet_of("vit", False, schemes=["none", "W8A8_STATIC", "NVFP4"])
    other.calibrate([{"pixel_values": 1.5 * each["pixel_values"]} for each in batches("vit")])
    assert other.fingerprint() != before


def test_all_that_a_calibration_runs_on_but_labels_is_of_the_fingerprint():
    found = []
    for more in ({}, {"labels": torch.zeros(6, dtype=torch.long)}, {"output_attentions": False}):
        supernet = supernet_of("vit", False, schemes=["none", "W8A8_STATIC"])
        supernet.calibrate([{**each, **more} for each in batches("vit")])
        found.append(supernet.fingerprint())
    assert found[0] == found[1] != found[2]


def test_an_own_scheme_of_another_definition_is_another_fingerprint(monkeypatch):
    found = set()
    for low, granularity in ((-32, "channel"), (-16, "channel"), (-16, "tensor")):
        monkeypatch.setitem(ELEMENTS, "int6", Element("int6", 8, low, 31, dtype=torch.int8))
        monkeypatch.setitem(SCHEMES, "MINE", Scheme("MINE", Format("int6", granularity)))
        found.add(supernet_of("bert", schemes=["none", "MINE"]).fingerprint())
    assert len(found) == 3


def test_of_shipped_schemes_the_name_says_it_all(monkeypatch):
    for name, each in SCHEMES.items():
        assert own_definition(each) is None and own_definition(each.fitted([256])) is None
        assert own_definition(replace(each, name="MINE")) is not None, name
    assert own_definition(replace(SCHEMES["W8A8"], activations=None)) is not None
    monkeypatch.setitem(ELEMENTS, "int8", Element("int8", 8, -127, 127, dtype=torch.int8))
    assert own_definition(SCHEMES["W8A8"]) is not None and own_definition(SCHEMES["W4A16"]) is None


def test_scores_are_forgotten_when_calibration_changes_what_they_were_measured_on():
    supernet = supernet_of("bert")
    supernet.scores[supernet.space.smallest.tobytes()] = {"quality": 1.0}
    supernet.calibrate(batches("bert", seed=5))
    assert not supernet.scores
