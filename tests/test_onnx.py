"""Exports for ONNX Runtime: the same codes, in operators that it has, give what the extracted model gives."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet, installed
from jointopt.checkpoint.onnx.session import OnnxModel
from jointopt.targets import TARGETS
from tests import zoo
from tests.saved import SMALL, save_tokenizer
from tests.zoo import batches, logits, make

pytest.importorskip("onnxruntime")
SCHEMES = [
    "none", "W8A8", "W8A8_STATIC", "W8A8_STATIC_ASYM", "W8A16_CHANNEL", "W4A16", "W4A16_ASYM", "FP8", "FP8_DYNAMIC",
    "FP8A16",
]  # fmt: skip


@cache
def supernet_of(name: str) -> Supernet:
    return zoo.supernet_of(name, SCHEMES, precision_per="layer")


def mixed(supernet: Supernet):
    """A genome of unequal blocks in which every number format is used."""
    return supernet.space.sample(1, seed=7)[0]


@cache
def exported(name: str, place: Path) -> Path:
    supernet = supernet_of(name)
    return jointopt.export(supernet, mixed(supernet), place / name, target="onnxruntime")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("onnx")


def lost_by_argmax(found: torch.Tensor, expected: torch.Tensor) -> float:
    """By how much the class that was chosen is below the best, at most: 0 where all agree."""
    chosen = expected.gather(-1, found.argmax(-1, keepdim=True))[..., 0]
    return float((expected.amax(-1) - chosen).max())


NAMES = [
    "vit",
    "bert",
    "llama_tied",
    pytest.param("llama_untied", marks=pytest.mark.slow),
    "resnet",
    "timm_vit",
    pytest.param("timm_resnet", marks=pytest.mark.slow),
    pytest.param("resnet_basic", marks=pytest.mark.slow),
    pytest.param("roberta", marks=pytest.mark.slow),
    pytest.param("distilbert", marks=pytest.mark.slow),
    pytest.param("qwen3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_gives_what_the_extracted_model_gives(name, place):
    supernet = supernet_of(name)
    model, session = supernet.extract(mixed(supernet)), OnnxModel(exported(name, place) / "model.onnx", 1)
    found, expected = [], []
    for seed in range(10):
        batch = batches(name, count=1, size=12, seed=seed)[0]
        output = session(**batch)
        found.append(output if isinstance(output, torch.Tensor) else output["logits"])
        expected.append(logits(model, batch))
    found, expected = torch.cat(found), torch.cat(expected)
    scale = expected.abs().max()
    # A last bit can turn into a step of the next layer's rounding, but not often.
    assert (found - expected).abs().mean() < 2e-3 * scale
    assert lost_by_argmax(found, expected) < 0.05 * scale


def exported_vit(folder: Path, scheme: str, **options) -> tuple[nn.Module, OnnxModel]:
    """A ViT of timm with every layer in one scheme, and as ONNX Runtime runs it."""
    torch.manual_seed(0)
    shape = {"patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **shape, **options).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, ["none", scheme], preset="fixed"))
    supernet.calibrate([{"x": torch.randn(8, 3, *model.patch_embed.img_size)}])
    jointopt.export(supernet, supernet.space.smallest, folder, target="onnxruntime")
    return supernet.extract(supernet.space.smallest), OnnxModel(folder / "model.onnx", 1)


@pytest.mark.parametrize("scheme", ["W8A16_CHANNEL", "W8A8_STATIC"])
def test_a_vit_of_any_image_size_exports_as_one(scheme, tmp_path):
    model, session = exported_vit(tmp_path / "vit", scheme, img_size=64, dynamic_img_size=True, dynamic_img_pad=True)
    for size in ((64, 64), (32, 80), (50, 57)):
        images = torch.randn(4, 3, *size)
        expected = logits(model, {"x": images})
        torch.testing.assert_close(session(x=images), expected, atol=0.01 * float(expected.abs().max()), rtol=0)


def test_a_vit_of_one_image_size_keeps_it_whichever_that_is(tmp_path):
    """That of these sides was once the example's by which models of any size are traced."""
    _, session = exported_vit(tmp_path / "vit", "W8A16_CHANNEL", img_size=(64, 96))
    assert session.session.get_inputs()[0].shape == ["batch", 3, 64, 96]


def test_calibration_images_that_the_graph_would_not_take_are_refused(tmp_path):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed"))
    supernet.calibrate([{"pixel_values": torch.randn(4, 3, 24, 32), "interpolate_pos_encoding": True}])
    with pytest.raises(JointoptError, match=r"images of the calibration are 24 x 32, and the graph takes the 16 x 16"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "vit", target="onnxruntime")


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_stored_wider_than_its_format(name, place):
    folder, supernet = exported(name, place), supernet_of(name)
    record = json.loads((folder / "jointopt.json").read_text())
    size = supernet.costs(mixed(supernet))["size"]
    layers = len(record["layers"])
    # Of a normalization after integer products a bias stays; its weight is in the scales.
    model = supernet.extract(mixed(supernet))
    folded = sum(14 * m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    # compressed-tensors keeps the shape of packed weights, ONNX some constants.
    assert size - 16 * layers - folded <= record["stored"] <= size + 64 * layers
    assert (folder / "model.onnx").stat().st_size < 1.5 * size + 200_000


def test_only_stock_operators_are_used(place):
    import onnx

    graph = onnx.load(str(exported("llama_tied", place) / "model.onnx"))
    assert {each.domain for each in graph.opset_import} <= {"", "com.microsoft"}
    assert {node.op_type for node in graph.graph.node if node.domain == "com.microsoft"} <= {"MatMulNBits"}
    assert not graph.functions


@pytest.mark.parametrize("name", ["vit", "bert", "llama_tied", "timm_vit", "resnet"])
def test_onnx_runtime_loads_a_file_without_a_warning(name, place, capfd):
    import onnxruntime

    onnxruntime.InferenceSession(exported(name, place) / "model.onnx")
    assert capfd.readouterr().err == ""


def test_decoding_with_the_cache_gives_what_one_pass_gives(place):
    session = OnnxModel(exported("llama_tied", place) / "model.onnx", 1)
    ids = batches("llama_tied", size=2)[0]["input_ids"]
    whole = session(input_ids=ids)["logits"]
    step = session(input_ids=ids[:, :9])
    parts = [step["logits"]]
    for at in range(9, 16):
        past = {k.replace("present", "past_key_values"): v for k, v in step.items() if k.startswith("present")}
        step = session(input_ids=ids[:, at : at + 1], **past)
        parts.append(step["logits"])
    found = torch.cat(parts, 1)
    assert (found - whole).abs().mean() < 2e-3 * whole.abs().max()
    assert lost_by_argmax(found, whole) < 0.05 * whole.abs().max()


def test_a_padded_batch_gives_what_its_samples_give_alone(place):
    session = OnnxModel(exported("bert", place) / "model.onnx", 1)
    batch = batches("bert", count=1)[0]
    together = session(**batch)["logits"]
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        alone = session(input_ids=batch["input_ids"][row : row + 1, :length])["logits"]
        assert (together[row] - alone[0]).abs().max() < 5e-2


@pytest.mark.parametrize("name", ["vit", "timm_vit"])
def test_an_export_verifies_in_a_process_of_its_own(name, place):
    supernet = supernet_of(name)
    batch = batches(name, count=1, size=48, seed=3)[0]

    def quality(model) -> float:
        output = model(**batch)
        return float((output if isinstance(output, torch.Tensor) else output.logits).argmax(-1).float().mean())

    verification = jointopt.verify(exported(name, place), quality=quality)
    assert verification.ok, verification.differences
    assert verification.metrics["quality"] == quality(supernet.extract(mixed(supernet)))


def test_the_card_s_own_code_computes_what_was_scored_on_any_processor(tmp_path, monkeypatch):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16"], precision_per="block"))
    supernet.calibrate(batches("vit"))
    genes = {gene.name: gene.choices for gene in supernet.space.genes}
    batch = batches("vit", seed=3)[0]
    for scheme in ("W8A8", "W4A16"):
        other = {name: "none" if "none" in choices else choices[-1] for name, choices in genes.items()}
        chosen = {name: scheme if scheme in choices else other[name] for name, choices in genes.items()}
        genome = supernet.space.encode(chosen)
        card = (jointopt.export(supernet, genome, tmp_path / scheme, target="onnxruntime") / "README.md").read_text()
        assert ("x64quantprecision" in card) == (scheme == "W8A8")
        monkeypatch.chdir(tmp_path)
        names: dict = {}
        exec(card.partition("```python\n")[2].partition("```")[0], names)
        found = names["session"].run(["logits"], {"pixel_values": batch["pixel_values"].numpy()})[0]
        expected = logits(supernet.extract(genome), batch)
        apart = (torch.from_numpy(found) - expected).abs() / expected.abs().max()
        if scheme == "W8A8":  # a last bit that becomes a step of rounding moves single samples further
            assert apart.mean() < 0.01 and apart.max() < 0.05
        else:
            assert apart.max() < 1e-5


def test_beside_the_file_are_the_sizes_of_every_layer_and_how_it_generates(place):
    folder, supernet = exported("llama_tied", place), supernet_of("llama_tied")
    model = supernet.extract(mixed(supernet))
    config = json.loads((folder / "config.json").read_text())
    for at, layer in enumerate(model.model.layers):
        own = config.get("per_layer_config", {}).get(str(at), {})
        assert own.get("intermediate_size", config["intermediate_size"]) == layer.mlp.up_proj.out_features
    assert (folder / "generation_config.json").is_file()


def test_a_changed_model_does_not_verify(place, tmp_path):
    import onnx

    folder = tmp_path / "changed"
    shutil.copytree(exported("vit", place), folder)
    graph = onnx.load(str(folder / "model.onnx"))
    bias = next(each for each in graph.graph.initializer if each.name.endswith("classifier.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(graph, str(folder / "model.onnx"))
    verification = jointopt.verify(folder)
    assert not verification.ok and "outputs" in verification.differences[0]


def test_where_inputs_are_rounded_a_few_samples_may_be_decided_otherwise(place, tmp_path):
    folder = tmp_path / "scored"
    shutil.copytree(exported("bert", place), folder)
    record = json.loads((folder / "jointopt.json").read_text())
    (folder / "jointopt.json").write_text(json.dumps({**record, "metrics": {"accuracy": 1.0}}))
    assert not jointopt.verify(folder, quality=lambda model: {"accuracy": 0.96}).differences
    (said,) = jointopt.verify(folder, quality=lambda model: {"accuracy": 0.94}).differences
    assert said == "accuracy: 0.94 reloaded, 1 recorded (allowed 0.05 apart)"


def test_an_export_without_its_config_does_not_verify(place, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(exported("vit", place), folder)
    (folder / "config.json").unlink()
    (difference,) = jointopt.verify(folder).differences
    assert difference.startswith("reload: config.json cannot be read: ")


def test_what_was_finished_exports_too(tmp_path):
    supernet = supernet_of("vit")
    finished = jointopt.finish(supernet, mixed(supernet), batches("vit", count=4))
    folder = jointopt.export(supernet, finished, tmp_path / "finished", target="onnxruntime")
    batch = batches("vit", count=1, size=48, seed=3)[0]
    found = OnnxModel(folder / "model.onnx", 1)(**batch)["logits"]
    expected = logits(finished.model, batch)
    assert (found - expected).abs().mean() < 2e-3 * expected.abs().max()


def test_what_onnx_runtime_cannot_run_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model = make("vit")
    for schemes, match in ((["NVFP4"], r"NVFP4 has no form there; allowed: none, W8A8"), (["W8A8_ASYM"], "W8A8_ASYM")):
        supernet = Supernet(model, SearchSpace.for_model(model, schemes=schemes))
        supernet.calibrate(batches("vit"))
        with pytest.raises(JointoptError, match=match):
            jointopt.export(supernet, supernet.space.smallest, tmp_path / "out", target="onnxruntime")
    dynamic = zoo.supernet_of("llama_tied", ["none", "W8A8"], preset="fixed")
    dynamic.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(JointoptError, match="target onnxruntime: found rope_type dynamic; allowed: such as default"):
        jointopt.export(dynamic, dynamic.space.largest, tmp_path / "out", target="onnxruntime")
    with pytest.raises(JointoptError, match="did you mean 'onnxruntime'"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "out", target="onnxruntimes")
    half = Supernet(make("vit").bfloat16(), SearchSpace.for_model(make("vit").bfloat16(), schemes=["none", "W8A8"]))
    half.calibrate([{k: v.bfloat16() for k, v in batch.items()} for batch in batches("vit")])
    with pytest.raises(JointoptError, match=r"bfloat16; allowed: float32"):
        jointopt.export(half, half.space.smallest, tmp_path / "out", target="onnxruntime")
    held = make("llama_tied")
    cached = Supernet(held, SearchSpace.for_model(held, schemes=["none", "W8A8"], caches=["INT8"]))
    cached.calibrate(batches("llama_tied"))
    with pytest.raises(JointoptError, match="quantized cache"):
        jointopt.export(cached, cached.space.smallest, tmp_path / "out", target="onnxruntime")
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(JointoptError, match=r"found no onnxscript; pip install 'jointopt\[onnx\]'"):
        jointopt.export(half, half.space.smallest, tmp_path / "out", target="onnxruntime")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("bert", ["input_ids", "token_type_ids", "attention_mask"]),
        ("roberta", ["input_ids", "attention_mask"]),
        pytest.param("electra", ["input_ids", "token_type_ids", "attention_mask"], marks=pytest.mark.slow),
        pytest.param("distilbert", ["input_ids", "attention_mask"], marks=pytest.mark.slow),
    ],
)
def test_a_file_takes_what_the_tokenizer_beside_it_makes(name, made, tmp_path):
    supernet = zoo.supernet_of(name, ["none", "W8A16_CHANNEL"], preset="fixed")
    genome = supernet.space.smallest
    save_tokenizer(tmp_path, model_input_names=made)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    jointopt.export(supernet, genome, tmp_path / "export", processor=tokenizer, target="onnxruntime")
    session = OnnxModel(tmp_path / "export" / "model.onnx", 1).session
    given = tokenizer(["good film", "the film was bad"], padding=True, return_tensors="pt")
    assert {each.name for each in session.get_inputs()} == {*given} == {*made}
    found = torch.from_numpy(session.run(None, {key: each.numpy() for key, each in given.items()})[0])
    expected = logits(supernet.extract(genome), given)
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def test_types_that_are_all_one_are_no_input_where_no_tokenizer_says_what_it_makes(tmp_path):
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=0, type_vocab_size=1)).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, ["none", "W8A16_CHANNEL"], preset="fixed"))
    jointopt.export(supernet, supernet.space.largest, tmp_path / "roberta", target="onnxruntime")
    session = OnnxModel(tmp_path / "roberta" / "model.onnx", 1).session
    assert [each.name for each in session.get_inputs()] == ["input_ids", "attention_mask"]


def test_a_model_that_feeds_forward_in_chunks_is_traced_without(tmp_path):
    model = make("bert")
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    model.config.chunk_size_feed_forward = 1
    supernet = zoo.supernet_of("bert", ["none", "W8A16_CHANNEL"], model=model, preset="fixed")
    genome, batch = supernet.space.smallest, batches("bert")[0]
    jointopt.export(supernet, genome, tmp_path / "bert", target="onnxruntime")
    expected = logits(supernet.extract(genome), batch)
    session = OnnxModel(tmp_path / "bert" / "model.onnx", 1)
    torch.testing.assert_close(session(**batch)["logits"], expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def test_a_model_without_logits_is_refused_by_what_it_returns(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForQuestionAnswering(BertConfig(**sizes, vocab_size=50))
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    supernet.calibrate([{"input_ids": torch.arange(16).view(2, 8)}])
    with pytest.raises(JointoptError, match="the model returns start_logits, end_logits; allowed: logits"):
        jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="onnxruntime")
    assert not list(tmp_path.iterdir())


def test_every_scheme_of_the_target_is_tested_here():
    assert {"W4A16_CHANNEL", *SCHEMES} == set(TARGETS["onnxruntime"].schemes)
    assert np.unique(SCHEMES).size == len(SCHEMES)


@pytest.mark.parametrize("name", ["bert", "llama_tied"])
@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC", "FP8A16"])
def test_an_embedding_in_fp8_is_looked_up_as_bytes(name, scheme, place):
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", scheme]))
    supernet.calibrate(batches(name))
    choices = supernet.space.decode(supernet.space.largest)
    choices = {gene: "none" if gene.endswith("precision") else choice for gene, choice in choices.items()}
    choices["embedding.precision"] = scheme
    genome = supernet.space.encode(choices)
    folder = jointopt.export(supernet, genome, place / f"{name}-{scheme}", target="onnxruntime")
    verification = jointopt.verify(folder)
    assert verification.ok, verification.differences
