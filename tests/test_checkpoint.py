"""Exports: what is in them, loaded by others, and verified to be what was recorded."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, RobertaForMaskedLM, XLMRobertaForMaskedLM

import jointopt
from jointopt import JointoptError, Roofline, SearchSpace, Supernet, load_device
from jointopt.checkpoint import verification
from jointopt.checkpoint.exporting import stored_bytes
from jointopt.checkpoint.reload import load_model
from jointopt.outputs import logits_of
from jointopt.rebuilding.block_sizes import is_uniform, settle_sizes, sizes_of_blocks
from jointopt.rebuilding.timm_recipe import preprocessing
from quant.formats import ELEMENTS, Element, Format, Scheme
from quant.formats import SCHEMES as FORMATS
from tests.zoo import batches, logits, make, mean_square, supernet_of

BLOCKS = {"qwen2": "layers", "llama_tied": "layers", "bert": "encoder.layer"}
"""Where their blocks are, in the base model."""


def uniform(supernet: Supernet, **choices) -> object:
    """The largest genome, each precision gene set by the part of its name that `choices` gives."""
    chosen = supernet.space.decode(supernet.space.largest)
    for gene in chosen:
        if gene.endswith(".precision"):
            wanted = [scheme for part, scheme in choices.items() if part in gene]
            chosen[gene] = wanted[0] if wanted else "none"
    return supernet.space.encode(chosen)


quality = mean_square("llama_tied", seed=3)


def dynamic(element: str, granularity: str = "token", group: int | None = None, **options) -> Format:
    return Format(element, granularity, group, dynamic=True, **options)


@pytest.mark.parametrize("name", ["qwen2", "llama_tied", "bert"])
def test_reading_the_sizes_of_blocks_leaves_the_config_as_it_is(name):
    model = make(name)
    before = model.config.to_dict()
    assert len(sizes_of_blocks(model, model.config)) == len(model.base_model.get_submodule(BLOCKS[name]))
    assert is_uniform(model) == (name != "bert")
    assert model.config.to_dict() == before


def test_an_export_says_the_head_size_that_its_config_left_to_be_derived():
    model = make("qwen2")
    settle_sizes(model, config := copy.deepcopy(model.config))
    attention = model.get_submodule("model.layers.0.self_attn")
    assert "head_dim" not in model.config.to_dict() and config.head_dim == attention.head_dim


OWN = {  # made when their elements are there
    "INT4": lambda: (Format("int4", "channel"), dynamic("int6")),
    "ASYM": lambda: (Format("int4", "channel", symmetric=False), Format("int6", "tensor", symmetric=False)),
    "MXINT8": lambda: (Format("int8", "group", 32, scale="e8m0"), dynamic("int8", "group", 32, scale="e8m0")),
    "CODES": lambda: (Format("nf4", "channel", scale="absmax"), dynamic("levels")),
    "LEVELS": lambda: (Format("levels", "group", 32), dynamic("int8", "tensor")),
    "ABSMAX": lambda: (Format("fp8_e4m3", "channel", scale="absmax"), dynamic("narrow")),
}


@pytest.mark.parametrize("name", OWN)
def test_a_format_of_one_s_own_is_the_same_when_reloaded(name, tmp_path, monkeypatch):
    """Elements that the folder's file has no list of: their range and steps are in its config."""
    for element in (
        Element("int6", 8, -32, 31, dtype=torch.int8),
        Element("narrow", 8, -240, 240, 3, -6, torch.float8_e4m3fn),
        Element("levels", 4, -1, 2, values=(2.0, -1.0, 0.0, 0.5, -0.5)),
    ):
        monkeypatch.setitem(ELEMENTS, element.name, element)
    monkeypatch.setitem(FORMATS, "MINE", Scheme("MINE", *OWN[name]()))
    supernet = supernet_of("vit", schemes=["none", "MINE"], preset="fixed")
    genome = uniform(supernet, block="MINE")
    folder = jointopt.export(supernet, genome, tmp_path / "out")
    assert jointopt.verify(folder).differences == ()
    assert stored_bytes(folder) == supernet.costs(genome)["size"]


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_inputs_whose_scales_are_e4m3_are_the_same_in_a_reloaded_bfloat16_model(granularity, tmp_path, monkeypatch):
    mine = Scheme("MINE", Format("fp8_e4m3", "channel"), dynamic("fp8_e4m3", granularity, scale="e4m3"))
    monkeypatch.setitem(FORMATS, "MINE", mine)
    supernet = supernet_of("vit", model=make("vit").to(torch.bfloat16), schemes=["none", "MINE"], preset="fixed")
    genome = uniform(supernet, block="MINE")
    folder = jointopt.export(supernet, genome, tmp_path / "out")
    pixels = {"pixel_values": batches("vit", seed=2)[0]["pixel_values"].bfloat16()}
    with supernet.active(genome) as view:
        assert torch.equal(logits(load_model(str(folder)), pixels), logits(view, pixels))


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(input_ids=ids).logits
print(json.dumps([type(model).__name__, model.dtype == torch.bfloat16, logits.float().flatten()[-50:].tolist()]))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_uniform_sub_network_loads_as_the_stock_class_through_compressed_tensors(tmp_path, dtype):
    schemes = ["none", "W8A8", "W4A16", "FP8_DYNAMIC", "FP8", "W8A8_STATIC", "W4A8", "W4A4", "W8A16", "W8A8_ASYM"]
    if dtype == torch.bfloat16:
        schemes += ["NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16"]
    supernet = supernet_of(
        "llama_tied", model=make("llama_tied").to(dtype), schemes=schemes, depth=[2, 3], mlp=[128, 256]
    )
    chosen = {g.name: schemes[1 + at % (len(schemes) - 1)] for at, g in enumerate(supernet.space.genes)}
    chosen = {name: scheme for name, scheme in chosen.items() if name.endswith(".precision") and "embed" not in name}
    genome = supernet.space.encode({"depth": 3, **{f"block{i}.mlp": 128 for i in range(3)}, **chosen})
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    assert not (folder / "modeling_jointopt.py").exists()
    ids = batches("llama_tied", seed=2)[0]["input_ids"]
    command = [sys.executable, "-I", "-c", STOCK, str(folder), json.dumps(ids.tolist())]
    kind, same_dtype, found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with supernet.active(genome) as view:
        expected = logits(view, {"input_ids": ids}).float().flatten()[-50:]
    assert kind == "LlamaForCausalLM" and same_dtype == (dtype == torch.bfloat16)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2 * float(expected.abs().max())
    torch.testing.assert_close(torch.tensor(found), expected, atol=tolerance, rtol=1e-5)


def test_layers_of_unequal_size_are_listed_under_the_standard_key(tmp_path):
    supernet = supernet_of("llama_untied", schemes=["none", "W8A8"], mlp=[128, 256], heads=[2, 4])
    genome = supernet.space.encode(
        {**supernet.space.decode(supernet.space.largest), "block1.mlp": 128, "block2.heads": 2}
    )
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    layered = {int(at): each for at, each in config["per_layer_config"].items()}
    assert layered[1]["intermediate_size"] == 128
    assert (layered[2]["num_attention_heads"], layered[2]["num_key_value_heads"]) == (2, 1)
    classes = {"AutoModelForCausalLM": "JointoptLlamaForCausalLM", "AutoModel": "JointoptLlamaModel"}
    assert config["auto_map"] == {auto: f"modeling_jointopt.{name}" for auto, name in classes.items()}
    assert not jointopt.verify(folder).differences


def test_an_export_is_verified_against_the_score_of_the_search(tmp_path):
    supernet = supernet_of("llama_tied", schemes=["none", "W8A8", "W4A16"])
    study = jointopt.search(supernet, quality, evaluations=12)
    genome = study.best(knee=True)
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    result = jointopt.verify(folder, quality=quality)
    assert result.ok and result.size == supernet.costs(genome)["size"]
    assert result.metrics["quality"] == pytest.approx(study.results(genome[None])[0]["quality"], rel=1e-5)
    assert not jointopt.verify(folder, quality=lambda model: quality(model) + 1).ok


def test_verify_notices_a_changed_weight_and_a_changed_size(tmp_path):
    supernet = supernet_of("vit", schemes=["none", "W8A8"])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("classifier.weight"))
    save_file({**tensors, name: -tensors[name]}, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(line.startswith("outputs:") for line in jointopt.verify(folder).differences)
    save_file({**tensors, "extra": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(line.startswith("size:") for line in jointopt.verify(folder).differences)
    (folder / "model.safetensors").write_bytes((1).to_bytes(8, "little") + b"{}")
    with pytest.raises((JointoptError, ValueError)):
        jointopt.verify(folder)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('said'), os.system('echo said')", ()),
        ("os._exit(1)", ("reload: the fresh process ended",)),
        ("torch.nn.Module.__call__ = lambda *_, **__: os._exit(1)", ("reload: the fresh process ended",)),
        ("torch.nn.Module.__call__ = lambda *_, **__: 1 / 0", ("reload: ZeroDivisionError: division by zero",)),
        ("time.sleep(600)", ("reload: no answer from the fresh process for 1 s",)),
        (
            "sys.modules['__main__'].send = lambda pipe, *_: (pipe.send_bytes(b'{}'), time.sleep(600))",
            ("reload: no answer from the fresh process for 1 s",),
        ),
    ],
)
def test_a_process_that_prints_ends_fails_or_hangs(code, said, tmp_path, monkeypatch):
    supernet = supernet_of("timm_resnet", schemes=["none", "W8A8"])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    with (folder / "modeling_jointopt.py").open("a") as file:
        file.write(f"\nimport os, sys, time, torch\n{code}\n")
    if "sleep" in code:
        monkeypatch.setattr(verification, "_SECONDS", 1.0)
    assert jointopt.verify(folder).differences == said


@pytest.mark.parametrize(("target", "name"), [("transformers", "model.safetensors"), ("onnxruntime", "model.onnx")])
def test_outputs_that_are_small_are_compared_all_the_same(target, name, tmp_path):
    if target == "onnxruntime":
        pytest.importorskip("onnxruntime")
    folders = []
    for seed in (0, 1):
        model = make("vit", seed)
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.mul_(1e-4)
        supernet = supernet_of("vit", schemes=["W8A8"], model=model)
        folders.append(jointopt.export(supernet, supernet.space.smallest, tmp_path / str(seed), target=target))
    assert not jointopt.verify(folders[0]).differences
    (folders[1] / name).replace(folders[0] / name)
    (difference,) = jointopt.verify(folders[0]).differences
    assert difference.startswith("outputs: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[] "),
        ("model.onnx", b"<!DOCTYPE html>"),
        ("model.gguf", b""),
        ("model.gguf", b"<!DOCTYPE html>"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_line(name, content, tmp_path):
    if name != "model.safetensors":
        pytest.importorskip(name.removeprefix("model."))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JointoptError, match=f"{name}' cannot be read: .+; allowed: what export wrote") as caught:
        stored_bytes(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_study_of_other_weights_is_refused_and_its_own_super_network_is_not(tmp_path):
    supernet = supernet_of("llama_tied", schemes=["none", "W8A8"])
    other = supernet_of("llama_tied", model=make("llama_tied", seed=1), schemes=["none", "W8A8"])
    study = jointopt.search(supernet, quality, ["quality", "size"], evaluations=2)
    with pytest.raises(JointoptError, match="no longer what the study searched"):
        jointopt.export(other, other.space.smallest, tmp_path / "small", study=study)
    assert not list(tmp_path.iterdir())
    assert jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", study=study).is_dir()


def test_a_first_stage_as_narrow_as_the_stem_is_exported(tmp_path):
    torch.manual_seed(0)
    resnet = timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=5, channels=(32, 32, 32, 32)
    )
    supernet = Supernet(resnet.eval(), SearchSpace.for_model(resnet, schemes=["none"], stage=[0.5, 1.0]))
    supernet.calibrate(batches("timm_resnet"))
    genome, batch = supernet.space.smallest, batches("timm_resnet", seed=1)[0]
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    assert torch.equal(logits(load_model(str(folder)), batch), logits(supernet.extract(genome), batch))


def masked_language_model(kind: type[nn.Module]) -> nn.Module:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    return kind(kind.config_class(**sizes, num_hidden_layers=2, max_position_embeddings=66)).eval()


@pytest.mark.parametrize("kind", [BertForMaskedLM, RobertaForMaskedLM])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_a_masked_language_models_tied_head_and_its_bias_are_stored_once_and_reload(tmp_path, kind, end):
    model = masked_language_model(kind)
    model.get_output_embeddings().bias.data.normal_()
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A16"]))
    supernet.calibrate([{"input_ids": torch.randint(3, 96, (3, 13))}])
    genome = getattr(supernet.space, end)
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    assert sum(t.nbytes for t in load_file(folder / "model.safetensors").values()) == supernet.costs(genome)["size"]
    found = jointopt.verify(folder)
    assert found.ok, found.differences


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8_STATIC_ASYM", "NVFP4"])
def test_the_input_statistics_of_a_tied_head_that_comes_before_its_embedding_are_counted_once(tmp_path, scheme):
    model = masked_language_model(XLMRobertaForMaskedLM)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", scheme]))
    supernet.calibrate([{"input_ids": torch.randint(3, 96, (3, 13))}])
    genome = uniform(supernet, embedding=scheme)
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    assert stored_bytes(folder) == supernet.costs(genome)["size"]


def test_dropped_attention_and_mlp_survive_the_reload(tmp_path):
    for name in ("llama_tied", "bert", "vit", "timm_vit"):
        supernet = supernet_of(name, schemes=["none", "W8A8"], attention_keep=True, mlp_keep=True)
        folder = jointopt.export(supernet, supernet.space.sample(1, seed=1)[0], tmp_path / name)
        result = jointopt.verify(folder)
        assert result.ok, (name, result.differences)


def test_the_card_tells_how_to_load_and_what_it_is(tmp_path):
    supernet = supernet_of("timm_resnet", schemes=["none", "W4A16"])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", base_model="timm/resnet")
    card = (folder / "README.md").read_text()
    assert (
        "from modeling_jointopt import load" in card and "head.precision" in card and "base_model: timm/resnet" in card
    )


def test_the_card_names_no_folder_of_the_user_s_as_a_model_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("bert").save_pretrained("models/bert")
    supernet = supernet_of("bert", model=AutoModelForSequenceClassification.from_pretrained("models/bert"))
    folder = jointopt.export(supernet, supernet.space.smallest, "small")
    assert "base_model:" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("schemes", "smallest", "tags"),
    [
        (["none", "W8A8"], True, "[jointopt, quantized, pruned]"),
        (["W8A8"], False, "[jointopt, quantized]"),
        (["none"], True, "[jointopt, pruned]"),
    ],
)
def test_the_card_is_tagged_by_what_was_done(tmp_path, schemes, smallest, tags):
    supernet = supernet_of("vit", schemes=schemes)
    folder = jointopt.export(
        supernet, supernet.space.smallest if smallest else supernet.space.largest, tmp_path / "small"
    )
    card = (folder / "README.md").read_text()
    assert f"tags: {tags}" in card
    assert ("Weights were rounded" in card) == ("quantized" in tags)


@pytest.mark.parametrize(("scheme", "unpacks"), [("W8A8", True), ("FP8_E5M2", False)])
def test_the_card_warns_threads_of_compressed_tensors_first_call(tmp_path, scheme, unpacks):
    supernet = supernet_of("vit", schemes=[scheme], preset="fixed", unquantized=["embedding"])
    card = (jointopt.export(supernet, supernet.space.largest, tmp_path / "small") / "README.md").read_text()
    assert ("compressed-tensors unpacks" in card) == unpacks


@pytest.mark.parametrize(
    ("place", "name"),
    [("models--owner--my--bert/snapshots/0123456789abcdef", "owner/my--bert"), ("my-bert", "my-bert")],
)
def test_the_card_names_a_folder_by_its_name_or_hub_id(tmp_path, place, name):
    make("bert").save_pretrained(tmp_path / place)
    supernet = supernet_of("bert", model=AutoModelForSequenceClassification.from_pretrained(tmp_path / place))
    card = (jointopt.export(supernet, supernet.space.smallest, tmp_path / "small") / "README.md").read_text()
    assert f"# A searched sub-network of {name}\n" in card
    assert str(tmp_path) not in card.partition("## Loading")[0]


def test_a_narrowed_stem_is_told_to_what_is_built_upon_a_timm_model(tmp_path):
    supernet = supernet_of("timm_resnet", schemes=["none"])
    model = load_model(str(jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")))
    widths = [each["num_chs"] for each in model.feature_info]
    assert widths == [each.shape[1] for each in model.forward_intermediates(batches("timm_resnet")[0]["x"])[1]]


def test_the_card_gives_times_their_unit_and_where_they_come_from(tmp_path):
    model = make("llama_tied")
    latency = Roofline(load_device("h100"), batch=2, context=64)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]), latency=latency)
    supernet.calibrate(batches("llama_tied"))
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    card, record = (folder / "README.md").read_text(), json.loads((folder / "jointopt.json").read_text())
    assert f"Times are by the {latency.source}, batch 2, context 64." in card
    assert f"| latency (ms) | {record['costs']['latency'] * 1e3:.6g} |" in card
    assert "| size (MB) |" in card and "| peak memory (MB) |" in card
    assert record["latency"] == latency.described()


def test_what_timm_builds_again_is_given_images_as_the_original_is(tmp_path):
    model = make("timm_vit")
    means = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    model.pretrained_cfg = {"input_size": (3, 16, 16), "crop_pct": 0.9, **means}
    supernet = supernet_of("timm_vit", model=model, schemes=["none", "W8A8"])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    wanted = resolve_model_data_config(model)
    assert wanted["mean"] == (0.4, 0.5, 0.6)
    assert resolve_model_data_config(load_model(str(folder))) == wanted
    assert "resolve_model_data_config(model)" in (folder / "README.md").read_text()
    onnx = jointopt.export(supernet, supernet.space.smallest, tmp_path / "onnx", target="onnxruntime")
    beside = json.loads((onnx / "config.json").read_text())["pretrained_cfg"]
    found = resolve_data_config(pretrained_cfg=beside)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == wanted
    assert "resolve_data_config" in (onnx / "README.md").read_text()


@pytest.mark.parametrize("channels", [1, 4])
def test_what_takes_other_than_three_channels_says_as_many_means_and_deviations(channels):
    made = timm.create_model("resnet10t", in_chans=channels)
    told = resolve_data_config(pretrained_cfg=preprocessing(made))
    assert told["input_size"] == [channels, 176, 176]
    assert told["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * channels)
    mode = {1: "L", 4: "RGBA"}[channels]
    image = create_transform(**told, is_training=False)(Image.new(mode, (200, 200)))
    assert image.shape == (channels, 176, 176)


@pytest.mark.parametrize("name", ["bert", "timm_vit"])
def test_a_folder_with_its_own_file_is_put_into_another_dtype_trained_around_and_loaded_again(name, tmp_path):
    supernet = supernet_of(name, schemes=["none", "FP8A16", "W4A16_ASYM"])
    folder = jointopt.export(supernet, supernet.space.sample(1, seed=1)[0], tmp_path / "export")
    batch = batches(name)[0]
    loaded = load_model(str(folder))
    with torch.inference_mode():
        expected = logits(loaded, batch)
    codes = {key: tensor.clone() for key, tensor in loaded.state_dict().items() if "weight" in key}
    logits_of(loaded, batch).sum().backward()
    for dtype in (torch.float64, torch.float32):
        loaded.to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad():
            found = logits(loaded, inputs)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-3)
    for key, tensor in loaded.state_dict().items():
        if "weight_scale" in key or "weight_packed" in key:
            assert torch.equal(tensor, codes[key]), key
    halved = {key: tensor * 0.5 if "weight_scale" in key else tensor for key, tensor in loaded.state_dict().items()}
    loaded.load_state_dict(halved)
    with torch.no_grad():
        assert not torch.allclose(logits(loaded, batch), expected, atol=1e-3)


def test_a_generation_config_that_transformers_does_not_write_is_named(tmp_path):
    supernet = supernet_of("llama_tied", ["none", "W8A8"], preset="fixed")
    supernet.model.generation_config.temperature = 0.6
    with pytest.raises(JointoptError, match="export: model.generation_config: .*temperature.*; allowed: a valid one"):
        jointopt.export(supernet, supernet.space.largest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"target": "tvm"}, "verify: '.*jointopt.json': target: found 'tvm'; allowed: "),
        ({"layers": [{"scheme": "MINE"}]}, "scheme 'MINE': unknown"),
    ],
)
def test_a_record_with_a_name_that_is_not_known_here_is_one_line(damage, said, tmp_path):
    record = {"choices": {}, "probe": None, "costs": {"size": 1}, "layers": [], "metrics": {}, **damage}
    (tmp_path / "jointopt.json").write_text(json.dumps(record))
    with pytest.raises(JointoptError, match=f"^{said}"):
        jointopt.verify(tmp_path)
