"""Convolutions in ONNX Runtime: integer ones fused with what follows, of any padding, and layers that run twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import jointopt
from jointopt import Block, Family, Layer, Part, SearchSpace, Supernet, Width
from jointopt.checkpoint.onnx.session import OnnxModel
from tests.zoo import batches, logits, make


def integer_resnet(name: str, change=None, scheme: str = "W8A8_STATIC_ASYM"):
    """A ResNet with all layers in one scheme (`change` was done to it before), and as ONNX has it."""
    from jointopt.checkpoint.onnx.graph import onnx_program

    model = make(name)
    if change is not None:
        change(model)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", scheme], preset="fixed"))
    supernet.calibrate(batches(name))
    extracted = supernet.extract(supernet.space.smallest)
    return extracted, onnx_program(extracted)


def as_run(program, name: str, tmp_path: Path) -> torch.Tensor:
    program.save(str(tmp_path / "model.onnx"))
    session = OnnxModel(tmp_path / "model.onnx", 1)
    return torch.cat([session(**batches(name, count=1, seed=seed)[0])["logits"] for seed in range(6)])


def kinds(program) -> list[str]:
    return [node.op_type for node in program.model.graph]


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8_STATIC_ASYM"])
def test_a_convolution_whose_readers_are_static_is_one_operator_with_its_normalization_and_relu(scheme, tmp_path):
    extracted, program = integer_resnet("resnet", scheme=scheme)
    found = as_run(program, "resnet", tmp_path)
    expected = torch.cat([logits(extracted, batches("resnet", count=1, seed=seed)[0]) for seed in range(6)])
    # The stem, and two of three convolutions of each of 5 blocks; the others add to the residual stream.
    assert kinds(program).count("QLinearConv") == 11 and kinds(program).count("MatMulInteger") == 7
    assert "ConvInteger" not in kinds(program) and "BatchNormalization" not in kinds(program)
    assert (found - expected).abs().mean() < 5e-4 * expected.abs().max()


def test_normalizations_that_turn_channels_round_or_off_are_folded_all_the_same(tmp_path):
    def turned(model) -> None:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight[::3] *= -1

    def off(model) -> None:
        turned(model)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data[0] = 0

    for change, expected_count in ((turned, 11), (off, 0)):  # a product of nothing has no whole bias
        extracted, program = integer_resnet("resnet", change)
        assert kinds(program).count("QLinearConv") == expected_count
        found = as_run(program, "resnet", tmp_path)
        expected = torch.cat([logits(extracted, batches("resnet", count=1, seed=seed)[0]) for seed in range(6)])
        assert (found - expected).abs().mean() < 5e-4 * expected.abs().max()


class Residual(nn.Module):
    def __init__(self, padding: int | str, mode: str, channels: int):
        super().__init__()
        self.up = nn.Conv2d(channels, 32, 3, padding=padding, padding_mode=mode)
        self.down = nn.Conv2d(32, channels, 1)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Grey(nn.Module):
    """Convolutions over one and over nine channels, so that kernels have an odd number of columns."""

    def __init__(self, padding: int | str, mode: str, channels: int = 9):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList([Residual(padding, mode, channels)])
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        return self.head(self.blocks[0](self.stem(x)).mean((2, 3)))


def declare(model: nn.Module) -> Family:
    layers = [Layer("stem", "stem", "stem"), Layer("head", "head", "head", tokens=False)]
    layers += [Layer(f"block0.{each}", f"blocks.0.{each}", f"block0.{each}", "block0") for each in ("up", "down")]
    width = Width("block0.mlp", "mlp", 32, (Part("blocks.0.up"),), (Part("blocks.0.down"),), block="block0")
    return Family("grey", (Block("block0", "blocks.0"),), (width,), tuple(layers))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W4A16_CHANNEL", "FP8A16"])
@pytest.mark.parametrize(("padding", "mode"), [(1, "zeros"), ("same", "zeros"), (1, "reflect"), (1, "circular")])
def test_convolutions_of_any_padding_and_number_of_columns_export(scheme, padding, mode, tmp_path):
    torch.manual_seed(0)
    net, images = Grey(padding, mode).eval(), torch.randn(8, 1, 8, 8)
    supernet = Supernet(net, SearchSpace.for_model(net, [scheme], family=declare, mlp=[32]), family=declare)
    supernet.calibrate([{"x": images}])
    expected = supernet.extract(supernet.space.largest)(images).detach()
    folder = jointopt.export(supernet, supernet.space.largest, tmp_path / "grey", target="onnxruntime")
    found = OnnxModel(folder / "model.onnx", 1)(x=images)
    torch.testing.assert_close(found, expected, atol=0.01 * float(expected.abs().max()), rtol=0)


class Twice(Grey):
    """The same, every layer but the first applied two times, the last to the tokens of an image."""

    def forward(self, x):
        tokens = self.blocks[0](self.blocks[0](self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(tokens).mean(1) + self.head(tokens.relu()).mean(1)


def declare_twice(model: nn.Module) -> Family:
    family = declare(model)
    return replace(family, layers=tuple(replace(each, tokens=True) for each in family.layers))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC"])
def test_layers_that_run_twice_load_though_two_integer_products_read_one_weight(scheme, tmp_path):
    torch.manual_seed(0)
    net, images = Twice(1, "zeros", channels=16).eval(), torch.randn(8, 1, 8, 8)
    space = SearchSpace.for_model(net, [scheme], family=declare_twice, mlp=[32])
    supernet = Supernet(net, space, family=declare_twice)
    supernet.calibrate([{"x": images}])
    expected = supernet.extract(space.largest)(images).detach()
    folder = jointopt.export(supernet, space.largest, tmp_path / "twice", target="onnxruntime")
    found = OnnxModel(folder / "model.onnx", 1)(x=images)
    torch.testing.assert_close(found, expected, atol=0.01 * float(expected.abs().max()), rtol=0)
