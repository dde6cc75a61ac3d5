"""Exports for vLLM: stock folders of transformers, whose fused layers have one format each that vLLM knows."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet, load_config
from jointopt.targets import TARGETS
from tests.zoo import batches, logits, make

PLAIN = ["embedding", "head"]


def supernet_of(name: str, schemes=("none", "W8A8", "W4A16"), **options) -> Supernet:
    model = make(name)
    given = {"depth": [2, 3], "unquantized": PLAIN, **options}
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=schemes, **given))
    supernet.calibrate(batches(name))
    return supernet


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "qwen2", "qwen3"])
def test_the_stock_class_reloads_the_sub_network_that_was_scored(name, tmp_path):
    supernet = supernet_of(name)
    genome = supernet.space.sample(1, seed=4)[0]
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="vllm")
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and not (folder / "modeling_jointopt.py").exists()
    assert "vllm serve out" in (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = batches(name, seed=2)[0]
    torch.testing.assert_close(logits(model, batch), logits(supernet.extract(genome), batch), rtol=1e-4, atol=1e-4)


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
    uneven = supernet_of("llama_tied", mlp=[128, 256])
    narrow = {**dict(uneven.space.decode(uneven.space.largest)), "block0.mlp": 128}
    embedded = supernet_of("llama_tied", ["W8A16"], unquantized=[])
    bert = supernet_of("bert", unquantized=[])
    for match, (supernet, genome) in {
        r"layers\.0\.self_attn: target vllm: found q_proj in W8A8, k_proj in W8A8, v_proj in none": (
            apart,
            apart.space.encode({**dict(apart.space.decode(apart.space.largest)), **mixed}),
        ),
        "blocks differ in size": (uneven, uneven.space.encode(narrow)),
        r"embed_tokens: target vllm: found it in W8A16.*unquantized": (embedded, embedded.space.smallest),
        "FP8 has no form there": (supernet_of("llama_tied", ["FP8"]), None),
        "found a bert; allowed: language models of llama": (bert, None),
    }.items():
        with pytest.raises(JointoptError, match=match):
            jointopt.export(
                supernet, supernet.space.smallest if genome is None else genome, tmp_path / "out", target="vllm"
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ("{mlp: [0.5, 1.0]}", r"space\.mlp with target vllm.*allowed: depth"),
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
