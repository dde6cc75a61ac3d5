"""Models on the edge of what is known: each is right, or refused in one line before anything is run."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    OlmoConfig,
    OlmoForCausalLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

import jointopt
from jointopt import Family, JointoptError, Layer, Part, Roofline, SearchSpace, Supernet, Width, load_device
from jointopt.rebuilding.runtime import resize
from jointopt.rebuilding.structure import tensors_of
from tests.zoo import batches, logits, make

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}


def timm_vit(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.create_model(name, **{**sizes, **options}).eval()


def tied_otherwise(name: str) -> nn.Module:
    """A LLaMA whose config says the opposite of its weights."""
    model = make(name)
    model.config.tie_word_embeddings = not model.config.tie_word_embeddings
    return model


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = make("bert")
    change(model)
    return model


@pytest.mark.parametrize("path", ["", "bert.encoder.layer.0"])
def test_a_super_network_that_was_compiled_in_place_still_has_sub_networks(path):
    model = make("bert")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(batches("bert"))
    smallest = supernet.space.smallest
    with supernet.active(smallest) as view:
        expected = logits(view, batches("bert")[0])
    supernet.model.get_submodule(path).compile(backend="eager")
    with supernet.active(smallest) as view:
        assert torch.equal(logits(view, batches("bert")[0]), expected)
    assert torch.equal(logits(supernet.extract(smallest), batches("bert")[0]), expected)


def compile_a_block(model: nn.Module) -> None:
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0])


def normalize_a_weight(model: nn.Module) -> None:
    weight_norm(model.bert.encoder.layer[0].output.dense)


def prune_a_layer(model: nn.Module) -> None:
    prune.l1_unstructured(model.bert.encoder.layer[1].output.dense, "weight", 0.5)


def forget_labels(model: nn.Module) -> None:
    model.classifier.weight = nn.Parameter(torch.empty(0, model.classifier.in_features))


def adapt_queries(model: nn.Module) -> None:
    get_peft_model(model, LoraConfig(target_modules=["query"]))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "untied, config tied": (
        lambda: tied_otherwise("llama_untied"),
        "tie_word_embeddings is True, .* does not share",
    ),
    "tied, config untied": (lambda: tied_otherwise("llama_tied"), "tie_word_embeddings is False, and the head shares"),
    "no label": (
        lambda: changed(forget_labels),
        r"classifier\.weight is of shape \[0, 128\]; allowed: sizes from 1",
    ),
    "heads in no whole groups": (
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=3)),
        "num_attention_heads is 4, its num_key_value_heads 3; allowed: a divisor",
    ),
    "multiple choice": (lambda: BertForMultipleChoice(BertConfig(**SMALL)), "multiple choice reads several texts"),
    "blurred": (lambda: timm.create_model("resnetblur18"), r"layer2\.0 has squeeze, attention or anti-aliasing"),
    "group normalization": (lambda: timm.create_model("resnet50_gn"), r"layer1\.0\.downsample is of Conv2d, GroupNorm"),
    "other blocks": (lambda: timm_vit("vit_small_patch16_18x2_224"), r"blocks\.0 is a ParallelThingsBlock"),
    "other MLPs": (lambda: timm.create_model("aimv2_large_patch14_224", depth=1), r"blocks\.0 is a .* and SwiGLU"),
    "normalized MLPs": (lambda: timm_vit(scale_mlp_norm=True), "no normalization within"),
    "weight norm": (
        lambda: changed(normalize_a_weight),
        r"layer\.0\.output\.dense: its weight is computed",
    ),
    "pruned": (lambda: changed(prune_a_layer), r"layer\.1\.output\.dense: its weight is computed"),
    "compiled": (lambda: changed(compile_a_block), r"bert\.encoder\.layer\.0 is what torch\.compile made"),
    "adapted": (lambda: changed(adapt_queries), r"query: a peft\..*Linear cannot be quantized; .*adapters are merged"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused_in_one_line_that_says_what(what):
    made, told = REFUSED[what]
    with pytest.raises(JointoptError) as error:
        SearchSpace.for_model(made(), schemes=["none", "W8A8"])
    assert "\n" not in str(error.value) and re.search(told, str(error.value)), str(error.value)


def test_costs_of_a_model_that_takes_no_sample_are_refused_in_one_line():
    config = ViTConfig(image_size=3, patch_size=4, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = ViTForImageClassification(config)
    with pytest.raises(JointoptError, match=r"it cannot compute one sample, as the vit family gives it: .*3 x 3"):
        Supernet(model, SearchSpace.for_model(model)).original_costs()


@pytest.mark.parametrize("model", [BertForNextSentencePrediction(BertConfig(**SMALL)), timm_vit(norm_layer="rmsnorm")])
def test_what_no_library_will_build_again_is_said_before_the_search(model, tmp_path):
    """What `export` would say after it."""
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"])
    with pytest.warns(UserWarning, match=r"export: .*; this model can be searched, but not exported"):
        Supernet(model, space)


@pytest.mark.parametrize(
    "made",
    [
        lambda: timm_vit(pos_embed="none"),
        lambda: timm_vit("vit_base_patch32_siglip_256"),
        lambda: timm_vit("vit_base_patch16_clip_quickgelu_224"),
        lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(**SMALL, pad_token_id=1)).eval(),
        lambda: LlamaForQuestionAnswering(LlamaConfig(**SMALL)).eval(),
    ],
    ids=["no positions", "GELUTanh", "QuickGELU", "a head before its embedding", "a base of another name"],
)
def test_relatives_with_other_parts_reload_as_they_were_searched(made, tmp_path):
    torch.manual_seed(0)
    model = made()
    named = "timm_vit" if type(model).__module__.startswith("timm") else "llama_tied"
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(batches(named))
    batch = batches(named, seed=1)[0]

    def quality(each: nn.Module) -> float:
        output = each(**batch)
        return float((output if torch.is_tensor(output) else output[0]).square().mean())

    for at, genome in enumerate(supernet.space.sample(2, seed=0)):
        with supernet.active(genome) as view, torch.no_grad():
            expected = quality(view)
        found = jointopt.verify(jointopt.export(supernet, genome, tmp_path / str(at)), quality)
        assert found.ok, found.differences
        assert found.metrics["quality"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="basic")),
        timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 2), num_classes=0, channels=(32,) * 4),
    ],
    ids=["transformers", "timm"],
)
def test_a_resnet_without_a_head_returns_as_many_features_however_narrow_its_stages(model):
    images = torch.zeros(2, 3, 32, 32)

    def features(of: nn.Module) -> torch.Size:
        found = of.eval()(images)
        return (found if torch.is_tensor(found) else found.pooler_output).shape

    space = SearchSpace.for_model(model, stage=[0.5, 1.0])
    supernet = Supernet(model, space)
    supernet.calibrate([{"pixel_values" if isinstance(model, ResNetModel) else "x": images}])
    assert features(supernet.extract(space.smallest)) == features(model)


class Grouped(nn.Module):
    def __init__(self, first: nn.Module, norm: nn.Module):
        super().__init__()
        self.first, self.norm, self.second = first, norm, nn.Conv2d(32, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.norm(self.first(x)))).mean((2, 3)))


def declare_grouped(model: nn.Module) -> Family:
    width = Width("w", "mlp", 32, (Part("first"), Part("norm")), (Part("second"),))
    return Family("grouped", (), (width,), (Layer("head", "head", "head", tokens=False),))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Grouped(nn.Conv2d(16, 32, 3, groups=2), nn.BatchNorm2d(32)), "first, which width 'w' names, is a Conv2d of"),
        (Grouped(nn.Conv2d(16, 32, 3), nn.GroupNorm(4, 32)), "norm, which width 'w' names, is a GroupNorm of"),
    ],
)
def test_channels_of_groups_are_no_width(model, told):
    """Sorted or cut, they would be read by other groups: another function."""
    with pytest.raises(JointoptError, match=told):
        SearchSpace.for_model(model, ["none"], family=declare_grouped, mlp=[16, 32])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(32, affine=False), nn.InstanceNorm2d(32)])
def test_a_normalization_without_parameters_follows_its_width(norm):
    model = Grouped(nn.Conv2d(16, 32, 3), norm)
    pixels = torch.randn(4, 16, 9, 9)
    model(pixels)  # in training: running statistics differ from channel to channel
    space = SearchSpace.for_model(model.eval(), ["none"], family=declare_grouped, mlp=[16, 32])
    supernet = Supernet(model, space, family=declare_grouped)
    supernet.calibrate([{"x": pixels}])
    with supernet.active(space.largest) as view, torch.no_grad():
        torch.testing.assert_close(view(pixels), model(pixels))
    narrow = supernet.extract(space.smallest)
    assert narrow.norm.num_features == 16
    with supernet.active(space.smallest) as view, torch.no_grad():
        assert torch.equal(view(pixels), narrow(pixels))
    assert supernet.costs(space.smallest)["size"] == sum(tensor.nbytes for tensor in tensors_of(narrow).values())


class GammaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(1, keepdim=True).rsqrt() * self.gamma[:, None, None]


def test_a_normalization_whose_scale_has_another_name_is_counted_and_timed():
    model = Grouped(nn.Conv2d(16, 32, 3), GammaRMSNorm()).eval()
    space = SearchSpace.for_model(model, ["none"], family=declare_grouped, mlp=[16, 32])
    supernet = Supernet(model, space, family=declare_grouped, latency=Roofline(load_device("h100")))
    supernet.calibrate([{"x": torch.randn(4, 16, 9, 9)}])
    narrow = supernet.extract(space.smallest)
    assert supernet.costs(space.smallest)["size"] == sum(tensor.nbytes for tensor in tensors_of(narrow).values())
    timed = {each["path"]: each["latency"] for each in supernet.breakdown(space.smallest)}
    assert timed["norm"] > 0


def declare_residual_width(model: nn.Module) -> Family:
    """The residual stream of an OLMo, whose normalizations have no tensors at all."""
    layers = [f"model.layers.{at}" for at in range(len(model.model.layers))]
    norms = [f"{layer}.{norm}" for layer in layers for norm in ("input_layernorm", "post_attention_layernorm")]
    writers = [f"{layer}.{each}" for layer in layers for each in ("self_attn.o_proj", "mlp.down_proj")]
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    readers = [f"{layer}.{each}" for layer in layers for each in inputs]
    producers = ["model.embed_tokens", *writers, *norms, "model.norm"]
    width = Width("width", "stage", 64, tuple(map(Part, producers)), tuple(map(Part, [*readers, "lm_head"])))
    return Family("olmo", (), (width,), (Layer("head", "lm_head", "head"),))


def test_normalizations_without_tensors_reload_at_their_width(tmp_path):
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(**SMALL)).eval()
    space = SearchSpace.for_model(model, ["none"], family=declare_residual_width, stage=[32, 64])
    supernet = Supernet(model, space, family=declare_residual_width)
    supernet.calibrate(batches("llama_tied"))
    found = jointopt.verify(jointopt.export(supernet, space.smallest, tmp_path / "small"))
    assert found.ok, found.differences


def test_counts_of_a_resized_normalization_without_a_weight_follow_its_statistics():
    norm = nn.BatchNorm2d(32, affine=False)
    resize(norm, {"running_mean": [16], "running_var": [16]})
    assert norm.num_features == 16


class Transposed(Grouped):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))
        self.second = nn.ConvTranspose2d(32, 16, 3)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            Grouped(nn.ConvTranspose2d(16, 32, 3), nn.BatchNorm2d(32)),
            "first, which width 'w' names, is a ConvTranspose2d, whose rows",
        ),
        (
            Grouped(nn.Conv2d(16, 32, 3), nn.Sequential(nn.BatchNorm2d(32))),
            "norm, which width 'w' names, is a Sequential, whose rows",
        ),
        (
            Grouped(nn.Conv2d(16, 32, 3), nn.LayerNorm([32, 7, 7])),
            "norm, which width 'w' names, is a LayerNorm, whose rows",
        ),
        (Transposed(), "second, which width 'w' names, is a ConvTranspose2d, whose columns"),
    ],
)
def test_what_cannot_be_cut_is_no_part_of_a_width(model, told):
    with pytest.raises(JointoptError, match=f"grouped: {told} cannot be cut; allowed: Linear, Conv2d"):
        SearchSpace.for_model(model, ["none"], family=declare_grouped, mlp=[16, 32])


def test_a_declaration_that_leaves_out_what_carries_a_width_is_told_when_it_is_calibrated():
    def declared(model: nn.Module) -> Family:
        width = Width("w", "mlp", 32, (Part("first"),), (Part("second"),))
        return Family("forgetful", (), (width,), (Layer("second", "second", "second"),))

    model = Grouped(nn.Conv2d(16, 32, 3), nn.GroupNorm(4, 32))
    supernet = Supernet(model, SearchSpace.for_model(model, ["none"], family=declared, mlp=[16, 32]), family=declared)
    before, space = copy.deepcopy(supernet.model.state_dict()), supernet.space
    with pytest.raises(JointoptError, match="forgetful: the smallest sub-network does not run: .*weight"):
        supernet.calibrate([{"x": torch.randn(2, 16, 9, 9)}])
    assert all(torch.equal(each, before[name]) for name, each in supernet.model.state_dict().items())
    supernet.training_view(supernet.space.largest)
    assert not supernet.trained and supernet.space is space


def test_a_shared_weight_that_the_declaration_does_not_name_is_refused():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
            self.head.weight = self.embedding.weight

    def declared(model: nn.Module, tied: tuple[str, ...] = ()) -> Family:
        return Family("tied", (), (), (Layer("embedding", "embedding", "embedding", tied=tied),))

    with pytest.raises(JointoptError, match=r"embedding: its weight is also that of head.*tied=\('head',\)"):
        SearchSpace.for_model(Tied(), ["none", "W8A16"], family=declared)
    SearchSpace.for_model(Tied(), ["none", "W8A16"], family=lambda model: declared(model, ("head",)))


def test_a_model_without_weights_is_not_calibrated():
    model = make("bert").to("meta")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    with pytest.raises(JointoptError, match="calibrate: the model is on the meta device"):
        supernet.calibrate(batches("bert"))


def test_a_base_of_another_name_computes_what_it_did():
    model = LlamaForQuestionAnswering(LlamaConfig(**SMALL)).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    supernet.calibrate(batches("llama_tied"))
    batch = batches("llama_tied", seed=1)[0]
    with supernet.active(supernet.space.largest) as view, torch.no_grad():
        torch.testing.assert_close(view(**batch).start_logits, model(**batch).start_logits)
