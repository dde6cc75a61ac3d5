"""The super-network: the original untouched, the largest is the original, views are what is extracted."""

from __future__ import annotations

import copy
import os
import warnings

import cloudpickle
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.checkpoint.reload import load_model
from jointopt.supernet.state import for_workers
from jointopt.supernet.subnetwork import Plan, renaming, staying_layers
from tests.zoo import MODELS, RELATIVES, SCHEMES, batches, logits, make, supernet_of, unquantized


@pytest.fixture(scope="module", params=[*MODELS, *RELATIVES])
def named(request) -> tuple[str, Supernet]:
    return request.param, supernet_of(request.param, SCHEMES)


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
    weights = []
    for genome in (supernet.space.largest, supernet.space.smallest):  # one after the other, as they are evaluated
        with supernet.active(genome) as view:
            weights.append(view.model.layers[0].self_attn.q_proj.weight)
    wide, narrow = weights
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


def test_assisted_decoding_works_where_an_attention_over_a_sliding_window_is_gone():
    supernet = supernet_of("mistral", schemes=["none"], attention_keep=True)
    genes = {gene.name: True for gene in supernet.space.genes} | {"block1.attention.keep": False}
    model = supernet.extract(supernet.space.encode(genes))
    prompt = batches("mistral")[0]["input_ids"][:1]
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    looked_up = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, plain)


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


def test_what_a_killed_process_left_beside_decides_nothing_and_a_link_stays_one(tmp_path):
    (tmp_path / "large").mkdir()
    link, file = tmp_path / "supernet.safetensors", tmp_path / "large/weights.safetensors"
    link.symlink_to(file)
    left = file.with_name(f".{file.name}")
    left.touch(mode=0o600)
    supernet_of("bert", SCHEMES).save(link)
    assert link.is_symlink() and not left.exists() and file.stat().st_mode & 0o077


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
        with pytest.raises(JointoptError, match=f"^{option}: found 'ms'; did you mean 'mse'"):
            Supernet(make("vit"), SearchSpace.for_model(make("vit")), **{option: "ms"})
    with pytest.raises(JointoptError, match="float32, bfloat16"):
        Supernet(make("bert").half(), space)
    with pytest.raises(JointoptError, match="lm_head.*NVFP4|embed_tokens.*NVFP4|NVFP4"):
        Supernet(make("bert"), SearchSpace([jointopt.Gene("pooler.precision", ("NVFP4",))]))


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
    for other in (copy.deepcopy(supernet), cloudpickle.loads(cloudpickle.dumps(for_workers(supernet, 1)))):
        with other.active(genome) as view:
            assert torch.equal(logits(view, batch), expected)
    extracted = supernet.extract(genome)
    extracted.disable_input_require_grads()
    assert not extracted.get_input_embeddings()._forward_hooks and model.get_input_embeddings()._forward_hooks
