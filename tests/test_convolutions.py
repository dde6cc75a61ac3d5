"""Convolutions of every kind in a declared family: depthwise ones whose groups follow an elastic width, 1x1, stem."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

import jointopt
from jointopt import Block, Family, Layer, Part, SearchSpace, Supernet, Width
from quant.formats import scheme
from quant.packing import packed_tensors, storage_bytes
from quant.reference import quantize
from tests.reread import reread

SCHEMES = ["none", "W8A8", "W8A8_STATIC", "W8A8_ASYM_BOTH", "W4A16_CHANNEL", "FP8_DYNAMIC", "NVFP4"]
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, min_depth=16, num_labels=5))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    return model.eval()


def declare(model: nn.Module) -> Family:
    """Each inverted residual's inner width runs through its depthwise convolution, whose groups are its channels."""
    stem = "mobilenet_v2.conv_stem.first_conv.convolution"
    blocks, widths, layers = [], [], [Layer("stem", stem, "stem")]
    for index, module in enumerate(model.mobilenet_v2.layer):
        name, path = f"block{index}", f"mobilenet_v2.layer.{index}"
        blocks.append(Block(name, path, removable=module.use_residual))
        expand, deep, reduce = (f"{path}.{part}" for part in ("expand_1x1", "conv_3x3", "reduce_1x1"))
        grown = [f"{layer}.{part}" for layer in (expand, deep) for part in ("convolution", "normalization")]
        width, groups = module.conv_3x3.convolution.out_channels, f"{deep}.convolution"
        widths.append(
            Width(
                f"{name}.mlp",
                "mlp",
                width,
                tuple(Part(each) for each in grown),
                (Part(f"{reduce}.convolution"),),
                attributes=((groups, "groups", 1), (groups, "in_channels", 1)),
                block=name,
            )
        )
        for short, layer in (("expand", expand), ("deep", deep), ("reduce", reduce)):
            layers.append(Layer(f"{name}.{short}", f"{layer}.convolution", f"{name}.{short}", name))
    layers.append(Layer("head", "classifier", "head", tokens=False))
    return Family("mobilenet", tuple(blocks), tuple(widths), tuple(layers))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=IMAGES).logits


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    model = mobilenet()
    space = SearchSpace.for_model(model, SCHEMES, family=declare, mlp=[0.5, 1.0])
    found = Supernet(model, space, family=declare)
    found.calibrate([{"pixel_values": IMAGES}])
    return found


def in_scheme(supernet: Supernet, name: str, narrow: bool) -> object:
    chosen = {}
    for gene in supernet.space.genes:
        precision = gene.name.endswith(".precision")
        chosen[gene.name] = name if precision and name in gene.choices else gene.choices[0 if narrow else -1]
        if precision and name not in gene.choices:
            chosen[gene.name] = "none"
    return supernet.space.encode(chosen)


def test_sorting_depthwise_channels_leaves_the_function_unchanged(supernet):
    with supernet.active(in_scheme(supernet, "none", narrow=False)) as whole:
        torch.testing.assert_close(outputs(whole), outputs(mobilenet()), atol=1e-3, rtol=1e-3)


def test_groups_follow_the_width(supernet):
    model = supernet.extract(in_scheme(supernet, "W8A8", narrow=True))
    full = mobilenet()
    for small, large in zip(model.mobilenet_v2.layer, full.mobilenet_v2.layer, strict=True):
        deep = small.conv_3x3.convolution
        assert deep.groups == deep.in_channels == deep.out_channels < large.conv_3x3.convolution.groups
    assert torch.isfinite(outputs(model)).all()


def test_every_scheme_that_a_depthwise_convolution_can_take_is_offered(supernet):
    choices = {gene.name: gene.choices for gene in supernet.space.genes}
    assert choices["block1.deep.precision"] == tuple(each for each in SCHEMES if each != "NVFP4")
    assert any("NVFP4" in each for name, each in choices.items() if name.endswith("reduce.precision"))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_view_is_the_extracted_model(supernet, name):
    genome = in_scheme(supernet, name, narrow=True)
    with supernet.active(genome) as view:
        assert torch.equal(outputs(view), outputs(supernet.extract(genome)))


def test_macs_are_half_the_counted_operations(supernet):
    genome = in_scheme(supernet, "none", narrow=True)
    model = supernet.extract(genome)
    with FlopCounterMode(display=False) as counter:
        outputs(model)
    assert counter.get_total_flops() / 2 == len(IMAGES) * supernet.costs(genome)["macs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W8A8_STATIC", "W8A8_ASYM_BOTH"])
def test_an_export_is_verified_and_weighs_what_was_reported(supernet, name, tmp_path: Path):
    genome = in_scheme(supernet, name, narrow=True)
    with supernet.active(genome) as view:
        expected = float(outputs(view).square().mean())
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    result = jointopt.verify(folder, lambda model: float(outputs(model).square().mean()))
    assert result.ok, result.differences
    assert result.metrics["quality"] == pytest.approx(expected, rel=1e-4)
    assert result.size == supernet.costs(genome)["size"]


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (8, 1, 3, 3), (7, 16)])
def test_asymmetric_int8_weights_are_stored_as_they_were_quantized(shape):
    wanted = scheme("W8A8_ASYM_BOTH")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.7
    quantized = quantize(weight, wanted.weights)
    packed = packed_tensors(quantized, wanted)
    assert sum(tensor.nbytes for tensor in packed.values()) == storage_bytes(wanted, shape, 4)
    again = reread(quantized, wanted)
    assert torch.equal(again, quantized.dequantize())
    symmetric = quantize(weight, scheme("W8A8").weights).dequantize()
    assert (again - weight).square().mean() < (symmetric - weight).square().mean()
