"""Exports for vLLM: folders of transformers, stock or DeciLM, whose fused layers have one format each."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet, load_config
from jointopt.checkpoint.vllm_writer import _width, check
from jointopt.prepared import prepare
from jointopt.targets import TARGETS
from quant.layers import QuantizedLayer
from tests import zoo
from tests.saved import save_tokenizer
from tests.zoo import batches, logits, make, mean_square

PLAIN = ["embedding", "head"]


def supernet_of(name: str, schemes=("none", "W8A8", "W4A16"), **options) -> Supernet:
    return zoo.supernet_of(name, schemes, **{"depth": [2, 3], "unquantized": PLAIN, **options})


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "qwen2", "qwen3"])
def test_the_stock_class_reloads_the_sub_network_that_was_scored(name, tmp_path):
    supernet = supernet_of(name)
    genome = supernet.space.sample(1, seed=4)[0]
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="vllm")
    config = json.loads((folder / "config.json").read_text())
    paths = [path for path, module in supernet.extract(genome).named_modules() if isinstance(module, QuantizedLayer)]
    groups = config["quantization_config"]["config_groups"].values()
    assert sorted(path for group in groups for path in group["targets"]) == sorted(paths)  # names, no patterns
    assert "auto_map" not in config and not (folder / "modeling_jointopt.py").exists()
    assert "vllm serve out" in (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = batches(name, seed=2)[0]
    torch.testing.assert_close(logits(model, batch), logits(supernet.extract(genome), batch), rtol=1e-4, atol=1e-4)


UNEVEN = {"mlp": [128, 256], "attention_keep": True, "mlp_keep": True}


def uneven_genome(supernet: Supernet, **choices):
    """The largest genome but for block0 with half its FFN, block1 without attention, block2 without FFN."""
    small = {"block0.mlp": 128, "block1.attention.keep": False, "block2.mlp.keep": False}
    return supernet.space.encode({**dict(supernet.space.decode(supernet.space.largest)), **small, **choices})


def expected_by_vllm(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights that vLLM 0.33's DeciLM builds from a config: of all layers unquantized."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for at, block in enumerate(config["block_configs"]):
        path, attention, ffn = f"model.layers.{at}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            queries = heads * config["head_dim"]
            keys = heads // attention["n_heads_in_group"] * config["head_dim"]
            found[f"{path}.input_layernorm.weight"] = (hidden,)
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                found[f"{path}.self_attn.{name}_proj.weight"] = (rows, hidden)
            found[f"{path}.self_attn.o_proj.weight"] = (hidden, queries)
        if not ffn["no_op"]:
            if "ffn_mult" in ffn:
                size = -(int(2 * ffn["ffn_mult"] * hidden / 3) // -256) * 256
            else:
                size = ffn["intermediate_size"]
            found[f"{path}.post_attention_layernorm.weight"] = (hidden,)
            for name in ("gate", "up"):
                found[f"{path}.mlp.{name}_proj.weight"] = (size, hidden)
            found[f"{path}.mlp.down_proj.weight"] = (hidden, size)
    return found


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_blocks_that_differ_hold_what_decilm_builds_from_the_config(name, tmp_path):
    supernet = supernet_of(name, ["none"], **UNEVEN)
    genome = uneven_genome(supernet)
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="vllm")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert "vllm serve out --trust-remote-code" in (folder / "README.md").read_text()
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - safetensors' own
    assert stored == expected_by_vllm(config)


def test_blocks_that_differ_verify_in_their_formats(tmp_path):
    supernet = supernet_of("llama_tied", **UNEVEN)
    genome = uneven_genome(
        supernet,
        **{"block0.qkv.precision": "W8A8", "block0.gate_up.precision": "W4A16", "block1.down.precision": "W8A8"},
    )
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="vllm")
    quality = mean_square("llama_tied", seed=2)
    verification = jointopt.verify(folder, quality=quality)
    assert verification.ok, verification.differences
    assert verification.metrics["quality"] == pytest.approx(quality(supernet.extract(genome)), rel=1e-4)


@pytest.mark.parametrize("hidden", [576, 896, 2048, 4096, 5120])
def test_ffn_mult_says_every_size_that_is_a_multiple_of_its_step(hidden):
    for size in range(256, 4 * hidden, 256):
        said = _width(size, hidden)
        assert -(int(2 * said["ffn_mult"] * hidden / 3) // -256) * 256 == size
    assert _width(1152, hidden) == {"intermediate_size": 1152}


def known_to_vllm(group: dict) -> bool:
    """The conditions by which vLLM's compressed-tensors finds a kernel that computes as written, restated."""
    weights, inputs = group["weights"], group["input_activations"]
    by_row = weights["strategy"] == "channel" and weights["symmetric"] and not weights["dynamic"]
    if inputs is None:
        grouped = weights["strategy"] in ("group", "channel") and weights["type"] == "int"
        return grouped and weights["num_bits"] in (4, 8) and group["format"] == "pack-quantized"
    if weights["type"] == "float":
        return by_row and inputs["type"] == "float" and inputs["dynamic"] and group["format"] == "float-quantized"
    strategy = "token" if inputs["dynamic"] else "tensor"
    eight = weights["num_bits"] == inputs["num_bits"] == 8
    return by_row and eight and inputs["strategy"] == strategy and group["format"] == "int-quantized"


@pytest.mark.parametrize("scheme", [name for name in TARGETS["vllm"].schemes if name != "none"])
def test_every_format_of_the_target_meets_a_kernel_s_conditions(scheme, tmp_path):
    supernet = supernet_of("llama_tied", [scheme])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "out", target="vllm")
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(found["config_groups"]) == 1 and found["quant_method"] == "compressed-tensors"
    assert all(known_to_vllm(group) for group in found["config_groups"].values())


def test_what_vllm_would_not_load_or_not_compute_alike_is_refused(tmp_path):
    apart = supernet_of("llama_tied", precision_per="layer")
    mixed = {name: "W8A8" for name in apart.space.names if name.endswith("precision")} | {"block0.v.precision": "none"}
    headed = supernet_of("llama_tied", heads=[2, 4])
    narrow = {**dict(headed.space.decode(headed.space.largest)), "block0.heads": 2}
    headless = supernet_of("llama_tied", attention_keep=True)
    first = {**dict(headless.space.decode(headless.space.largest)), "block0.attention.keep": False}
    relative = supernet_of("qwen2", mlp=[128, 256])
    half = {**dict(relative.space.decode(relative.space.largest)), "block0.mlp": 128}
    embedded = supernet_of("llama_tied", ["W8A16"], unquantized=[])
    bert = supernet_of("bert", unquantized=[])
    for match, (supernet, genome) in {
        r"layers\.0\.self_attn: target vllm: found q_proj in W8A8, k_proj in W8A8, v_proj in none": (
            apart,
            apart.space.encode({**dict(apart.space.decode(apart.space.largest)), **mixed}),
        ),
        "found blocks of 2, 4 heads; allowed: as many": (headed, headed.space.encode(narrow)),
        "found a first block without attention": (headless, headless.space.encode(first)),
        "found a qwen2 whose blocks differ": (relative, relative.space.encode(half)),
        r"embed_tokens: target vllm: found it in W8A16.*unquantized": (embedded, embedded.space.smallest),
        "FP8 has no form there": (supernet_of("llama_tied", ["FP8"]), None),
        "found a bert; allowed: language models of llama": (bert, None),
    }.items():
        with pytest.raises(JointoptError, match=match):
            jointopt.export(
                supernet, supernet.space.smallest if genome is None else genome, tmp_path / "out", target="vllm"
            )
    assert not (tmp_path / "out").exists()


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
QWEN2, QWEN3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
WINDOW = {"use_sliding_window": True, "sliding_window": 4}


def small(kind: tuple, **options) -> torch.nn.Module:
    config, model = kind
    return model(config(**{**SIZES, **options}))


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (QWEN3, {"attention_bias": True}, r"layers\.0\.self_attn\.o_proj with a bias; allowed for this qwen3: without"),
        (MISTRAL, {"attention_bias": True}, r"q_proj without a bias; allowed for this mistral: with one"),
        (LLAMA, {"qkv_bias": True}, r"q_proj without a bias; allowed for this llama: with one"),
        (LLAMA, {"hidden_act": "gelu"}, "found hidden_act gelu; allowed: silu"),
        (QWEN2, {**WINDOW, "max_window_layers": 1}, "found layers of full_attention and sliding_attention in a qwen2"),
    ],
)
def test_what_vllm_computes_otherwise_or_does_not_load_is_refused_at_export(kind, options, match, tmp_path):
    model = small(kind, **options)
    supernet = zoo.supernet_of("llama_tied", ["none", "W8A8"], model=model, preset="fixed", unquantized=PLAIN)
    with pytest.raises(JointoptError, match=match):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "out", target="vllm")
    assert not (tmp_path / "out").exists()


def test_and_before_the_search(tmp_path, monkeypatch):
    small(QWEN3, attention_bias=True).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    path = configured(tmp_path, "{depth: [2, 3]}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JointoptError, match="o_proj with a bias; allowed for this qwen3"):
        prepare(load_config(path))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (QWEN2, {}),
        (QWEN2, {**WINDOW, "max_window_layers": 0}),
        (QWEN3, {}),
        (MISTRAL, {"sliding_window": 4}),
        (LLAMA, {"attention_bias": True}),
        (LLAMA, {"mlp_bias": True}),
    ],
)
def test_biases_and_windows_that_vllm_has_too_are_none_of_these(kind, options):
    check(small(kind, **options))


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ("{heads: [0.5, 1.0]}", r"space\.heads with target vllm; allowed: depth, mlp"),
        ("{preset: vit}", r"space\.preset vit with target vllm"),
        ("{precision_per: layer}", r"space\.precision_per layer with target vllm.*allowed: projection, block"),
        ("{schemes: [none, NVFP4]}", r"target vllm: NVFP4 has no form there"),
        ("{caches: [INT8]}", r"space\.caches with target vllm"),
    ],
)
def test_a_space_that_vllm_has_no_place_for_is_refused_at_once(space, match, tmp_path):
    with pytest.raises(JointoptError, match=match):
        load_config(configured(tmp_path, space))


def test_a_config_for_vllm_leaves_embedding_and_head_as_they_are(tmp_path):
    options = load_config(configured(tmp_path, "{depth: [2, 3], unquantized: [block1]}")).space_options()
    for name in ("llama_tied", "llama_untied"):
        genes = SearchSpace.for_model(make(name), **options).names
        assert not any(gene.startswith(("embedding", "head", "block1")) for gene in genes)
        assert "block0.qkv.precision" in genes


def test_a_space_for_vllm_has_widths_of_ffns_and_keeps_the_first_attention(tmp_path):
    silent = load_config(configured(tmp_path, "{}")).search_space(make("llama_tied"))
    assert {"depth", "block0.mlp"} <= set(silent.names) and not any("heads" in name for name in silent.names)
    skipping = load_config(configured(tmp_path, "{attention_keep: true}")).search_space(make("llama_tied"))
    assert "block1.attention.keep" in skipping.names and "block0.attention.keep" not in skipping.names
    assert "block0.attention.keep" not in skipping.genes[skipping.names.index("block0.qkv.precision")].requires


def test_blocks_of_what_vllm_has_no_decilm_for_stay_alike(tmp_path):
    silent = load_config(configured(tmp_path, "{}")).search_space(make("qwen2"))
    assert "depth" in silent.names and not any("mlp" in name for name in silent.names)
    with pytest.raises(JointoptError, match=r"space\.mlp with target vllm and a qwen2; allowed: depth$"):
        load_config(configured(tmp_path, "{mlp: [0.5, 1.0]}")).search_space(make("qwen2"))


def configured(folder, space: str):
    path = folder / "config.yaml"
    path.write_text(
        f"model: ./llama\ntask: causal-lm\ndata: {{calibrate: a.txt, evaluate: b.txt}}\nspace: {space}\n"
        "target: vllm\noutput: runs/x\n"
    )
    return path


def test_what_is_to_stay_unquantized_must_be_a_layer():
    with pytest.raises(JointoptError, match=r"space\.unquantized: found 'embeding'; did you mean 'embedding'"):
        SearchSpace.for_model(make("llama_tied"), unquantized=["embeding"])
