"""The super-network: the original untouched, the largest is the original, views are what is extracted."""

from __future__ import annotations

import copy
import os
import pickle
import warnings

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.batches import lengths, of_average_length
from jointopt.checkpoint.reload import load_model
from jointopt.supernet.subnetwork import Plan, renaming, staying_layers
from tests.zoo import MODELS, RELATIVES, SCHEMES, batches, logits, make, supernet_of

ALL = [*MODELS, *RELATIVES]


@pytest.fixture(scope="module", params=ALL)
def named(request) -> tuple[str, Supernet]:
    return request.param, supernet_of(request.param, SCHEMES)


def unquantized(supernet: Supernet, genome: np.ndarray) -> np.ndarray:
    chosen = supernet.space.decode(genome)
    return supernet.space.encode({k: "none" if k.endswith(".precision") else v for k, v in chosen.items()})


@pytest.mark.parametrize("change", ["load_state_dict", "an optimizer"])
def test_weights_that_someone_changed_are_noticed(change):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]))
    supernet.calibrate(batches("vit"))
    genome, batch = supernet.space.largest, batches("vit")[0]
    with supernet.active(genome) as view:
        before = logits(view, batch)
    assert supernet.calibrated and not supernet.trained
    if change == "load_state_dict":
        supernet.model.load_state_dict({k: 2 * v for k, v in supernet.model.state_dict().items()})
    else:
        optimizer = torch.optim.SGD(supernet.model.parameters(), lr=0.1)
        supernet.model(**batch).logits.square().sum().backward()
        optimizer.step()
    with pytest.raises(JointoptError, match="search: the super-network is not calibrated"):
        jointopt.search(supernet, lambda view: 1.0, evaluations=3)
    with supernet.active(genome) as view:
        noticed = logits(view, batch)
    assert not supernet.calibrated and supernet.trained
    supernet.calibrate(batches("vit"))
    with supernet.active(genome) as view:
        fresh = logits(view, batch)
    assert torch.equal(noticed, fresh) and not torch.equal(before, fresh)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda supernet: pickle.loads(pickle.dumps(supernet))])
def test_a_copy_stays_calibrated(how):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]))
    supernet.calibrate(batches("vit"))
    other = how(supernet)
    for each in (supernet, other):
        with each.active(each.space.largest) as view:
            logits(view, batches("vit")[0])
        assert each.calibrated


def test_sorting_leaves_the_function_of_the_whole_model_unchanged(named):
    name, supernet = named
    batch = batches(name, seed=1)[0]
    expected = logits(make(name), batch)
    with supernet.active(unquantized(supernet, supernet.space.largest)) as whole:
        torch.testing.assert_close(logits(whole, batch), expected, atol=2e-4, rtol=1e-3)


def test_a_view_computes_exactly_what_the_extracted_model_computes(named):
    name, supernet = named
    batch = batches(name, seed=1)[0]
    for genome in supernet.space.sample(4, seed=0):
        with supernet.active(genome) as view:
            seen = logits(view, batch)
        torch.testing.assert_close(seen, logits(supernet.extract(genome), batch), atol=1e-5, rtol=1e-5)


def test_every_sub_network_computes_finite_outputs_that_depend_on_the_genome(named):
    name, supernet = named
    batch = batches(name, seed=1)[0]
    seen = []
    for genome in supernet.space.sample(4, seed=3):
        with supernet.active(genome) as view:
            seen.append(logits(view, batch))
    assert all(torch.isfinite(values).all() for values in seen)
    assert not torch.allclose(seen[0], seen[1])


def test_parameters_and_bytes_are_those_of_the_extracted_model(named):
    name, supernet = named
    for genome in supernet.space.sample(4, seed=1):
        costs = supernet.costs(genome)
        model = supernet.extract(unquantized(supernet, genome))
        assert costs["parameters"] == sum(p.numel() for p in model.parameters())
        plain = supernet.costs(unquantized(supernet, genome))
        stored = {id(t): t for t in [*model.parameters(), *persistent_buffers(model)]}
        assert plain["size"] == sum(t.numel() * t.element_size() for t in stored.values())


def persistent_buffers(model: nn.Module) -> list[torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters]


def test_macs_are_half_the_counted_operations_of_a_forward_pass(named):
    name, supernet = named
    tokens = [length for batch in batches(name) for length in lengths(batch)]
    batch = of_average_length(batches(name)[0], tokens)
    for genome in [supernet.space.largest, *supernet.space.sample(3, seed=2)]:
        model = supernet.extract(unquantized(supernet, genome))
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
        rotary = 2 * 16 * 16 if "num_key_value_heads" in repr(getattr(model, "config", "")) else 0
        counted = counter.get_total_flops() / 2
        samples = len(next(iter(batch.values())))
        assert abs(counted - samples * supernet.costs(genome)["macs"]) <= samples * rotary


def test_an_original_that_was_trained_after_it_was_given_is_said():
    model = make("bert")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with supernet.original():
            pass
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    with pytest.warns(RuntimeWarning, match="has been trained or loaded anew since"), supernet.original():
        pass


def test_the_original_of_a_model_that_was_cast_turns_positions_as_sub_networks_do():
    model = make("llama_tied").to(torch.bfloat16)
    supernet = supernet_of("llama_tied", ["none", "W8A8"], model=model, preset="fixed")
    with supernet.original() as original, supernet.active(supernet.space.largest) as view:
        assert torch.equal(original.model.rotary_emb.inv_freq, view.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_frequencies_that_a_long_text_left_in_a_model_stay_there(tmp_path):
    config = make("llama_tied").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config.max_position_embeddings = 8
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    logits(model, {"input_ids": torch.full((1, 40), 7)})
    left = model.model.rotary_emb.inv_freq.clone()
    supernet = supernet_of("llama_tied", ["none", "W8A8"], model=model, preset="fixed")
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    batch = batches("llama_tied")[0]
    assert torch.equal(logits(load_model(str(folder)), batch), logits(supernet.extract(supernet.space.smallest), batch))
    assert torch.equal(model.model.rotary_emb.inv_freq, left)


def test_macs_of_texts_are_those_of_a_text_of_average_length_in_whichever_batches_they_come():
    ids, mask = torch.full((4, 12), 7), torch.zeros(4, 12, dtype=torch.long)
    for row, length in enumerate((2, 4, 6, 12)):
        mask[row, :length] = 1
    counted = []
    for sizes in ([4], [1, 1, 1, 1], [2, 2]):
        supernet = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["none", "W8A8"], preset="fixed"))
        parts = zip(ids.split(sizes), mask.split(sizes), strict=True)
        supernet.calibrate(
            [{"input_ids": each[:, : m.sum(1).max()], "attention_mask": m[:, : m.sum(1).max()]} for each, m in parts]
        )
        counted.append(supernet.original_costs()["macs"])
    whole = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["none", "W8A8"], preset="fixed"))
    whole.calibrate([{"input_ids": ids[:1, :6], "attention_mask": torch.ones(1, 6, dtype=torch.long)}])
    assert counted == [whole.original_costs()["macs"]] * 3


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_macs_of_texts_without_a_mask_are_those_with_one_of_ones(given):
    costs = []
    for masked in (False, True):
        supernet = supernet_of("llama_tied", ["none", "W8A8"], preset="fixed")
        size = supernet.model.config.hidden_size
        texts: list[dict] = []
        for length in (4, 30, 28, 31, 29):
            ids = torch.full((1, length), 7)
            values = ids if given == "input_ids" else torch.ones(1, length, size)
            texts.append({given: values, **({"attention_mask": torch.ones_like(ids)} if masked else {})})
        supernet.calibrate(texts)
        costs.append(supernet.costs(supernet.space.largest))
    assert costs[0] == costs[1]


def test_positions_that_all_texts_have_in_common_are_cut_with_them():
    ids, mask = torch.full((2, 8), 7), torch.ones(2, 8, dtype=torch.long)
    mask[1, 4:] = 0
    macs = []
    for positions in ({}, {"position_ids": torch.arange(8)[None]}):
        supernet = supernet_of("llama_tied", ["none", "W8A8"], preset="fixed")
        supernet.calibrate([{"input_ids": ids, "attention_mask": mask, **positions}])
        macs.append(supernet.costs(supernet.space.largest)["macs"])
    assert macs[0] == macs[1]


def test_inputs_that_cannot_be_cut_to_an_average_length_are_told_in_one_line():
    ids, mask = torch.full((2, 8), 7), torch.ones(2, 8, dtype=torch.long)
    mask[1, 4:] = 0
    supernet = supernet_of("bert", ["none", "W8A8"], preset="fixed")
    kinds = torch.zeros(8, dtype=torch.long)
    with pytest.raises(JointoptError, match=r"average length.*input_ids \[2, 6\].*allowed: inputs with one entry"):
        supernet.calibrate([{"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}])


def test_bops_are_macs_times_the_bits_of_weights_and_activations():
    supernet = supernet_of("vit", schemes=["none", "W8A8"], preset="fixed")
    whole = supernet.costs(unquantized(supernet, supernet.space.largest))
    assert whole["bops"] == whole["macs"] * 32 * 32
    quantized = supernet.costs(supernet.space.smallest)
    assert whole["macs"] * 8 * 8 < quantized["bops"] < whole["macs"] * 32 * 32


def test_costs_of_many_genomes_are_those_of_each(named):
    _, supernet = named
    genomes = supernet.space.sample(5, seed=4)
    columns = supernet.cost_columns(genomes)
    for row, genome in enumerate(genomes):
        assert supernet.costs(genome) == {measure: values[row] for measure, values in columns.items()}


def test_the_original_is_untouched_by_calibration_views_and_training():
    model = make("bert").train()
    handle = model.classifier.register_forward_hook(lambda *_: None)
    before, hooks = copy.deepcopy(model.state_dict()), dict(model.classifier._forward_hooks)
    supernet = Supernet(model, SearchSpace.for_model(model))
    supernet.calibrate(batches("bert"))
    labelled = [{**batch, "labels": torch.zeros(6, dtype=torch.long)} for batch in batches("bert")]
    jointopt.train_supernet(supernet, labelled, 2, learning_rate=0.1)
    with supernet.original() as given:
        assert not given.training
    assert model.training and dict(model.classifier._forward_hooks) == hooks
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    handle.remove()


def test_the_super_network_is_untouched_by_what_a_user_does_to_a_view():
    supernet = supernet_of("bert", SCHEMES)
    before = supernet.fingerprint()
    with supernet.active(supernet.space.sample(1, seed=0)[0]) as view:
        view.train()
        view.classifier = nn.Identity()
        view.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert supernet.fingerprint() == before
    assert not supernet.model.bert.encoder.layer[0]._forward_hooks


@pytest.mark.parametrize("name", ["llama_tied", "bert", "vit", "resnet"])
def test_a_module_is_found_by_its_new_path_where_blocks_before_it_left(name):
    supernet = supernet_of(name, ["none"])
    moved = 0
    for gone in (block for block in supernet.family.blocks if block.removable):
        plan = Plan(tuple(block for block in supernet.family.blocks if block != gone))
        view, renamed = supernet.built(plan), renaming(supernet.family, plan)
        for layer in staying_layers(supernet.family, plan):
            found, whole = view.get_submodule(renamed(layer.path)), supernet.model.get_submodule(layer.path)
            assert found.weight.data_ptr() == whole.weight.data_ptr()
            moved += renamed(layer.path) != layer.path
    assert moved


def test_a_view_copies_no_weight():
    supernet = supernet_of("llama_untied", SCHEMES)
    storages = {tensor.untyped_storage().data_ptr() for tensor in supernet.model.parameters()}
    genome = unquantized(supernet, supernet.space.smallest)
    with supernet.active(genome) as view:
        assert all(tensor.untyped_storage().data_ptr() in storages for tensor in view.parameters())


def test_an_extracted_model_shares_no_storage_with_the_super_network():
    supernet = supernet_of("llama_tied", SCHEMES)
    storages = {tensor.untyped_storage().data_ptr() for tensor in supernet.model.parameters()}
    model = supernet.extract(supernet.space.sample(1, seed=0)[0])
    assert not any(tensor.untyped_storage().data_ptr() in storages for tensor in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_quantized_weight_is_made_once_for_all_genomes_that_share_it():
    supernet = supernet_of("llama_untied", schemes=["W4A16"], heads=[2, 4])
    with supernet.active(supernet.space.largest) as large, supernet.active(supernet.space.smallest) as small:
        wide, narrow = (model.model.layers[0].self_attn.q_proj.weight for model in (large, small))
        assert wide.data_ptr() == narrow.data_ptr() and narrow.shape[0] == wide.shape[0] // 2


def test_batch_norm_statistics_are_those_of_the_sub_network():
    supernet = supernet_of("resnet", schemes=["none"])
    seen: list[torch.Tensor] = []
    with supernet.active(supernet.space.smallest) as view:
        convolution, norm = view.resnet.embedder.embedder.convolution, view.resnet.embedder.embedder.normalization
        convolution.register_forward_hook(lambda _, __, output: seen.append(output))
        for batch in batches("resnet"):
            logits(view, batch)
        expected = torch.stack([output.mean((0, 2, 3)) for output in seen]).mean(0)
        torch.testing.assert_close(norm.running_mean, expected, atol=1e-5, rtol=1e-4)


def test_blocks_leave_in_order_of_least_influence():
    model = make("llama_untied")
    with torch.no_grad():
        for name in ("o_proj", "down_proj"):
            parent = model.model.layers[0].self_attn if name == "o_proj" else model.model.layers[0].mlp
            getattr(parent, name).weight.mul_(1e-3)
    space = SearchSpace.for_model(model, schemes=["none"], depth=[2, 3])
    supernet = Supernet(model, space)
    supernet.calibrate(batches("llama_untied"))
    plan = supernet.plan(supernet.space.smallest)
    assert [block.name for block in plan.blocks] == ["block1", "block2"]


def test_important_channels_come_first():
    model = make("bert")
    important = 77
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, important] *= 50
    expected = model.bert.encoder.layer[0].intermediate.dense.weight[important].clone()
    supernet = Supernet(model, SearchSpace.for_model(model))
    supernet.calibrate(batches("bert"))
    assert torch.equal(supernet.model.bert.encoder.layer[0].intermediate.dense.weight[0], expected)


def test_attention_and_mlp_can_leave_alone():
    for name in ("llama_tied", "bert", "vit", "timm_vit"):
        supernet = supernet_of(name, schemes=["none", "W8A8"], attention_keep=True, mlp_keep=True)
        batch = batches(name)[0]
        for genome in [supernet.space.smallest, *supernet.space.sample(3, seed=0)]:
            with supernet.active(genome) as view:
                assert torch.isfinite(logits(view, batch)).all()
            model = supernet.extract(genome)
            assert supernet.costs(genome)["parameters"] == sum(p.numel() for p in model.parameters())


def test_generation_works_where_the_first_attention_is_gone():
    supernet = supernet_of("llama_tied", schemes=["none"], attention_keep=True)
    genes = {gene.name: True for gene in supernet.space.genes} | {"block0.attention.keep": False}
    model = supernet.extract(supernet.space.encode(genes))
    prompt = batches("llama_tied")[0]["input_ids"][:1]
    cached = model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    plain = model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)


def partly_sliding() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = Qwen2Config(
        **sizes,
        num_hidden_layers=3,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    return Qwen2ForCausalLM(config).eval()


def test_attentions_of_which_only_some_slide_stay_where_they_are():
    model = partly_sliding()
    with pytest.raises(JointoptError, match="attention_keep: only blocks 1, 2 have attention over a sliding window"):
        SearchSpace.for_model(model, schemes=["none"], attention_keep=True)
    space = SearchSpace.for_model(model, schemes=["none"], depth=[1, 2, 3], mlp_keep=True)
    supernet = Supernet(model, space)
    prompt = torch.arange(3, 19).view(1, -1)
    supernet.calibrate([{"input_ids": prompt}])
    for genome in space.sample(4, seed=0):
        cut = supernet.extract(genome)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        cached, plain = (cut.generate(prompt, use_cache=each, **options) for each in (True, False))
        assert torch.equal(cached, plain)


def test_training_moves_the_smallest_towards_the_largest():
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    data = batches("vit", count=2)
    supernet.calibrate(data)
    labelled = [{**batch, "labels": torch.arange(6) % 5} for batch in data]
    before = disagreement(supernet, data)
    history = jointopt.train_supernet(supernet, labelled, 30, learning_rate=1e-3)
    assert history[-1] < history[0]
    supernet.calibrate(data)
    assert disagreement(supernet, data) < before


def disagreement(supernet: Supernet, data: list) -> float:
    with supernet.active(supernet.space.smallest) as small, supernet.active(supernet.space.largest) as large:
        return sum(float((logits(small, b).softmax(-1) - logits(large, b).softmax(-1)).abs().mean()) for b in data)


def test_a_saved_super_network_is_readable_to_whom_the_umask_says(tmp_path):
    path = tmp_path / "supernet.safetensors"
    before = os.umask(0o027)
    try:
        supernet_of("bert", SCHEMES).save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_saved_super_network_is_restored_with_its_order(tmp_path):
    supernet = supernet_of("bert", SCHEMES)
    labelled = [{**batch, "labels": torch.zeros(6, dtype=torch.long)} for batch in batches("bert")]
    jointopt.train_supernet(supernet, labelled, 2, learning_rate=1e-2)
    supernet.calibrate(batches("bert"))
    supernet.save(tmp_path / "supernet.safetensors")
    again = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=SCHEMES))
    again.load(tmp_path / "supernet.safetensors")
    again.calibrate(batches("bert"))
    assert again.fingerprint() == supernet.fingerprint()


def test_a_restored_super_network_has_no_calibration_of_the_weights_before(tmp_path):
    model = make("bert")
    space = SearchSpace.for_model(model, schemes=["W8A8_STATIC"])
    fresh, other = (Supernet(model, space, repair=True) for _ in range(2))
    fresh.save(tmp_path / "supernet.safetensors")
    other.calibrate(batches("bert"))
    other.load(tmp_path / "supernet.safetensors")
    assert other.fingerprint() == fresh.fingerprint()
    with pytest.raises(JointoptError, match="W8A8_STATIC needs ranges of activations; call calibrate"):
        other.extract(space.smallest)


def test_what_was_calibrated_follows_a_model_that_is_moved_to_another_device():
    model = make("resnet")
    space = SearchSpace.for_model(model, schemes=["W8A8_STATIC"])
    supernet = Supernet(model, space, repair=True)
    supernet.calibrate(batches("resnet"))
    supernet.model.to("meta")  # as the Trainer and accelerate move it to an accelerator
    view = supernet.training_view(space.smallest)
    constants = [each for held in supernet._statistics.values() for each in held.values()]
    repaired = [each for pair in supernet._repaired.values() for each in pair if each is not None]
    kept = [each for batch in supernet.samples for each in batch.values()]
    held = [*view.parameters(), *constants, *repaired, *kept]
    assert constants and repaired and kept and {each.device.type for each in held} == {"meta"}


def test_what_was_quantized_follows_a_model_that_is_put_into_another_dtype():
    moved, model = supernet_of("llama_tied", schemes=["W8A8"]), make("llama_tied").to(torch.bfloat16)
    genome, batch = moved.space.largest, batches("llama_tied")[0]
    with moved.active(genome) as view:
        logits(view, batch)
    before = moved.costs(genome)
    moved.model.to(torch.bfloat16)
    made = Supernet(model, moved.space)
    made.calibrate(batches("llama_tied"))
    assert moved.costs(genome) == made.costs(genome) != before
    with moved.active(genome) as view:
        assert {each.dtype for each in view.parameters()} == {torch.bfloat16}
        assert logits(view, batch).dtype == torch.bfloat16


def test_errors_name_what_was_found_and_what_is_allowed():
    model = make("bert")
    space = SearchSpace.for_model(model)
    with pytest.raises(JointoptError, match="found no batch"):
        Supernet(model, space).calibrate([])
    with pytest.raises(JointoptError, match="known: llama"):
        SearchSpace.for_model(nn.Linear(2, 2))
    with pytest.raises(JointoptError, match=r"heads.*found 7.*1 to 4"):
        SearchSpace.for_model(model, heads=[7])
    with pytest.raises(JointoptError, match="did you mean 'heads'"):
        SearchSpace.for_model(model, head=[2])
    with pytest.raises(JointoptError, match="no such place; did you mean 'block0.heads'"):
        Supernet(model, SearchSpace([jointopt.Gene("block0.head", (2, 4))]))
    with pytest.raises(JointoptError, match="steps of 2"):
        Supernet(make("llama_tied"), SearchSpace([jointopt.Gene("block0.heads", (1, 4))]))
    for option in ("weight_calibration", "activation_calibration"):
        with pytest.raises(JointoptError, match="calibration: found 'ms'; did you mean 'mse'"):
            Supernet(make("vit"), SearchSpace.for_model(make("vit")), **{option: "ms"})
    with pytest.raises(JointoptError, match="float32, bfloat16"):
        Supernet(make("bert").half(), space)
    with pytest.raises(JointoptError, match="lm_head.*NVFP4|embed_tokens.*NVFP4|NVFP4"):
        Supernet(make("bert"), SearchSpace([jointopt.Gene("pooler.precision", ("NVFP4",))]))


def test_calibration_batches_that_the_model_does_not_take_are_refused_with_what_it_takes():
    model = make("timm_vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    with pytest.raises(JointoptError, match="calibrate: found a NoneType; allowed: batches"):
        supernet.calibrate(None)
    images = batches("timm_vit")[0]["x"]
    said = "calibrate: the model does not run on a batch of pixels: .*; allowed: what its forward takes, x"
    with pytest.raises(JointoptError, match=said):
        supernet.calibrate([{"pixels": images}])
    with pytest.raises(JointoptError, match="a batch of x: .* to have 3 channels, but got 1"):
        supernet.calibrate([{"x": images[:, :1]}])
    with pytest.raises(JointoptError, match=r"a batch of x: Input height \(12\) doesn't match model"):  # it asserts so
        supernet.calibrate([{"x": images[:, :, :12, :12]}])


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC"])
def test_samples_that_are_not_finite_are_refused_and_leave_nothing_behind(scheme):
    refused, fresh = (Supernet(make("vit"), SearchSpace.for_model(make("vit"), schemes=[scheme])) for _ in range(2))
    wrong = batches("vit", seed=1)
    wrong[0]["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(JointoptError, match="o_proj: calibration saw inputs that are not finite; allowed: finite"):
        refused.calibrate(wrong)
    for supernet in (refused, fresh):
        supernet.calibrate(batches("vit"))
    assert refused.fingerprint() == fresh.fingerprint()


def test_a_batch_of_padding_alone_is_refused():
    batch = batches("bert")[0]
    supernet = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["W8A8"]))
    with pytest.raises(JointoptError, match="calibrate: found a batch of padding alone"):
        supernet.calibrate([{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "mse", "entropy"])
def test_ranges_of_activations_by_every_method_leave_padding_out(method):
    padded = batches("bert", count=2)
    other = [
        {**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], b["input_ids"].flip(0))}
        for b in padded
    ]
    found = []
    for seen in (padded, other):
        model = make("bert")
        space = SearchSpace.for_model(model, schemes=["W8A8_STATIC", "FP8"], preset="fixed")
        supernet = Supernet(model, space, activation_calibration=method)
        supernet.calibrate(seen)
        found.append(supernet)
    for key in found[0]._statistics:
        for name, value in found[0]._statistics[key].items():
            torch.testing.assert_close(found[1]._statistics[key][name].float(), value.float(), rtol=0.03, atol=0)


def test_the_original_s_layout_has_the_layers_that_no_genome_of_the_space_keeps():
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"], depth=[1], mlp=[0.5]))
    supernet.calibrate(batches("vit"))
    whole = {record["name"]: record for record in supernet.original_layout()}
    linear = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert linear.keys() <= whole.keys() and len(supernet.layout(supernet.space.largest)) < len(whole)
    for name, layer in linear.items():
        assert (whole[name]["rows"], whole[name]["columns"], whole[name]["bits"]) == (*layer.weight.shape, 32)


def test_a_super_network_of_a_model_with_hooks_that_it_can_take_back_is_copied_and_sent():
    model = make("bert")
    model.enable_input_require_grads()  # as gradient checkpointing does, and adapters do
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(batches("bert"))
    genome, batch = supernet.space.smallest, batches("bert", seed=1)[0]
    with supernet.active(genome) as view:
        expected = logits(view, batch)
    for other in (copy.deepcopy(supernet), cloudpickle.loads(cloudpickle.dumps(supernet.for_workers(1)))):
        with other.active(genome) as view:
            assert torch.equal(logits(view, batch), expected)
    extracted = supernet.extract(genome)
    extracted.disable_input_require_grads()
    assert not extracted.get_input_embeddings()._forward_hooks and model.get_input_embeddings()._forward_hooks
