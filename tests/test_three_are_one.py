"""The promise everything rests on: the view, the extracted model and the reloaded export are one model."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    BertModel,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForTokenClassification,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForTokenClassification,
)

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.checkpoint import reload
from tests.zoo import MODELS, RELATIVES, SCHEMES, batches, logits, make

RELOAD = """
import importlib.util, json, sys
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
batch = load_file(sys.argv[3])
outputs = {}
for folder in json.loads(sys.argv[2]):
    with torch.no_grad():
        output = reload.load_model(folder)(**batch)
    outputs[folder] = (output if torch.is_tensor(output) else output[0]).contiguous()
assert not {"jointopt", "search_spaces", "quant"} & set(sys.modules)
save_file(outputs, sys.argv[4])
"""


def reloaded(folders: list[Path], batch: dict[str, torch.Tensor], place: Path) -> dict[str, torch.Tensor]:
    """Outputs of every folder for the batch, from one process in which jointopt is not imported."""
    save_file(batch, place / "batch.safetensors")
    names = json.dumps([str(folder) for folder in folders])
    paths = [reload.__file__, names, str(place / "batch.safetensors"), str(place / "outputs.safetensors")]
    subprocess.run([sys.executable, "-I", "-c", RELOAD, *paths], check=True, capture_output=True, cwd=place)
    return load_file(place / "outputs.safetensors")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-4 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)
    ordered = expected.sort(-1).values
    clear = ordered[..., -1] - ordered[..., -2] > 2 * tolerance
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


def three_are_one(name: str, count: int, place: Path, repair: bool = False, **options) -> None:
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=SCHEMES, **options), repair=repair)
    supernet.calibrate(batches(name))
    batch = batches(name, seed=1)[0]
    expected, folders = {}, []
    for at, genome in enumerate(supernet.space.sample(count, seed=0)):
        with supernet.active(genome) as view:
            seen = logits(view, batch)
        same(logits(supernet.extract(genome), batch), seen)
        folder = jointopt.export(supernet, genome, place / f"{name}-{at}")
        tensors = load_file(folder / "model.safetensors").values()
        assert supernet.costs(genome)["size"] == sum(t.numel() * t.element_size() for t in tensors)
        expected[str(folder)] = seen
        folders.append(folder)
    for folder, output in reloaded(folders, batch, place).items():
        same(output, expected[folder])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_view_extracted_and_reloaded_are_one_for_twenty_genomes(name, tmp_path):
    three_are_one(name, 20, tmp_path)


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_the_same_layout_are_one_as_well(name, tmp_path):
    three_are_one(name, 2, tmp_path)


HEADS = (
    ElectraForPreTraining,
    ElectraForTokenClassification,
    ElectraForQuestionAnswering,
    ElectraForMaskedLM,
    DistilBertForTokenClassification,
    DistilBertForQuestionAnswering,
    DistilBertForMaskedLM,
)


def test_other_heads_of_electra_and_distilbert_are_one_as_well(tmp_path):
    expected, batch = {}, batches("bert")[0]
    for kind in HEADS:
        torch.manual_seed(0)
        config = make(kind.config_class.model_type).config
        config.num_labels = 2
        model = kind(config).eval()
        supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16"]))
        supernet.calibrate(batches("bert"))
        genome = supernet.space.sample(1, seed=1)[0]
        with torch.no_grad(), supernet.active(genome) as view:
            seen = view(**batch).to_tuple()
            for found, each in zip(supernet.extract(genome)(**batch).to_tuple(), seen, strict=True):
                same(found, each)
        folder = jointopt.export(supernet, genome, tmp_path / kind.__name__)
        expected[folder] = seen[0]
    for folder, output in reloaded(list(expected), batch, tmp_path).items():
        same(output, expected[Path(folder)])


@pytest.mark.parametrize("precision_per", ["layer", "block"])
def test_precision_by_layer_and_by_block(precision_per, tmp_path):
    three_are_one("llama_tied", 2, tmp_path, precision_per=precision_per)


def _vit(**options) -> torch.nn.Module:
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=128, depth=2, num_heads=4, num_classes=5, **options
    ).eval()


def _resnet(**options) -> torch.nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(32, 48, 64, 96), **options).eval()


def _small_stem() -> torch.nn.Module:
    model = _resnet()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    return model


def _without(model: torch.nn.Module, *layers: str) -> torch.nn.Module:
    for path in layers:
        model.get_submodule(path).bias = None
    return model


def _of_other_epsilon(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.3
    return model


def _without_pooling() -> torch.nn.Module:
    return BertModel(make("bert").config, add_pooling_layer=False).eval()


SET_OTHERWISE = {
    "vit": [
        lambda: _vit(norm_layer=partial(torch.nn.LayerNorm, eps=0.3)),
        lambda: _vit(act_layer=partial(torch.nn.GELU, approximate="tanh")),
        lambda: _vit(proj_bias=False),
    ],
    "resnet": [
        _small_stem,
        lambda: _resnet(output_stride=8),
        lambda: _resnet(down_kernel_size=3),
        lambda: _of_other_epsilon(_resnet()),
    ],
    "bert": [lambda: _of_other_epsilon(make("bert")), lambda: _without(make("bert"), "classifier"), _without_pooling],
}


def test_a_stage_that_a_convolution_in_place_of_the_stem_s_pool_leads_into_is_narrowed(tmp_path):
    batch = batches("timm_resnet")[0]
    channels = (64, 48, 64, 96)  # the first as wide as the stem, so that its block has no shortcut of its own
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=channels, replace_stem_pool=True).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], stage=[0.5, 1.0]))
    supernet.calibrate([batch])
    assert {"stage1.width", "stem.pool.precision"} <= {gene.name for gene in supernet.space.genes}
    with supernet.active(supernet.space.smallest) as view:
        seen = logits(view, batch)
        assert view.maxpool[0].weight.shape[:2] == (32, 64)
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    same(reloaded([folder], batch, tmp_path)[str(folder)], seen)


@pytest.mark.parametrize("kind", SET_OTHERWISE)
def test_a_model_that_is_set_otherwise_than_its_library_does_is_reloaded_as_it_is(kind, tmp_path):
    batch = batches({"vit": "timm_vit", "resnet": "timm_resnet"}.get(kind, kind), seed=1)[0]
    expected, folders = {}, []
    for at, made in enumerate(SET_OTHERWISE[kind]):
        torch.manual_seed(at)
        model = made()
        supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed"))
        supernet.calibrate([batch])
        for genome in (supernet.space.largest, supernet.space.sample(1, seed=0)[0]):
            folder = jointopt.export(supernet, genome, tmp_path / f"{at}-{len(folders)}")
            with supernet.active(genome) as view, torch.no_grad():
                output = view(**batch)
            expected[str(folder)] = output if torch.is_tensor(output) else output[0]
            folders.append(folder)
    for folder, found in reloaded(folders, batch, tmp_path).items():
        same(found, expected[folder])


def test_a_timm_model_with_linear_layers_alone_quantized_is_reloaded(tmp_path):
    model, batch = make("timm_vit"), batches("timm_vit")[0]
    schemes = ["none", "W8A8", "FP8_DYNAMIC", "W4A16"]
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=schemes, preset="fixed"))
    supernet.calibrate([batch])
    folders, expected = [], {}
    for scheme in schemes:
        genes = [gene for gene in supernet.space.genes if "block" in gene.name and scheme in gene.choices]
        chosen = {**supernet.space.decode(supernet.space.largest), **{gene.name: scheme for gene in genes}}
        genome = supernet.space.encode(chosen)
        folders.append(jointopt.export(supernet, genome, tmp_path / scheme))
        with supernet.active(genome) as view:
            expected[str(folders[-1])] = logits(view, batch)
    for folder, found in reloaded(folders, batch, tmp_path).items():
        same(found, expected[folder])


def test_what_the_library_cannot_build_is_refused_with_its_path(tmp_path):
    model = _resnet()
    model.layer1[0].conv1 = torch.nn.Conv2d(64, 32, 3, padding=1, bias=True)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed"))
    supernet.calibrate(batches("timm_resnet"))
    with pytest.raises(JointoptError, match=r"layer1\.0\.conv1 has a bias; the Conv2d .* has none"):
        jointopt.export(supernet, supernet.space.largest, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("name", ["resnet_basic", "timm_resnet_basic"])
def test_convolutions_that_pad_by_more_than_zeros_are_reloaded_as_they_were(name, tmp_path):
    model = make(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]))
    supernet.calibrate(batches(name))
    batch = batches(name, seed=1)[0]
    with supernet.active(supernet.space.largest) as view:
        expected = logits(view, batch)
    folder = jointopt.export(supernet, supernet.space.largest, tmp_path / "circular")
    (found,) = reloaded([folder], batch, tmp_path).values()
    same(found, expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_a_model_that_drops_paths_and_more_in_training_is_reloaded(name, tmp_path):
    vit = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "patch_drop_rate": 0.2}
    options = vit if name.startswith("vit") else {"drop_block_rate": 0.1}
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.2, **options).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]))
    batch = {"x": torch.randn(6, 3, 16, 16)}
    supernet.calibrate([batch])
    with supernet.active(supernet.space.smallest) as view, torch.no_grad():
        expected = view(**batch)
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "dropped")
    (found,) = reloaded([folder], batch, tmp_path).values()
    same(found, expected)
