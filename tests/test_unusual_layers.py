"""Layers of own models that share their weights, or that the forward pass uses in ways of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jointopt
from jointopt import Family, JointoptError, Layer, SearchSpace, Supernet
from jointopt.cost.positions import measure_positions
from jointopt.rebuilding.structure import tensors_of
from quant.layers import QuantizedLinear

Declare = Callable[[nn.Module], Family]


def declaring(*layers: Layer) -> Declare:
    return lambda model: Family("own", (), (), layers)


def calibrated(model: nn.Module, declare: Declare, scheme: str, *batches: dict[str, Tensor]) -> Supernet:
    space = SearchSpace.for_model(model, ["none", scheme], family=declare)
    supernet = Supernet(model, space, family=declare)
    supernet.calibrate(batches)
    return supernet


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Repeated(nn.Module):
    """One layer three times, as ALBERT has one block many times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(32, 32)] * 3), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.embed(x))))


SHARING = {
    "a layer that is there again": (
        Repeated,
        declaring(Layer("layer", "layers.0", "layer", tied=("layers.1", "layers.2")), Layer("head", "head", "head")),
        random(8, 6, 32),
    ),
    "a head that names its embedding": (
        TiedHead,
        declaring(Layer("head", "head", "head", tied=("embed",)), Layer("mix", "mix", "mix")),
        torch.arange(40).view(4, 10),
    ),
}


@pytest.mark.parametrize("rounding", ["gptq", "descent", "learned"])
@pytest.mark.parametrize("case", SHARING)
def test_layers_that_share_a_weight_share_their_codes_when_finished(case, rounding):
    torch.manual_seed(0)
    made, declare, x = SHARING[case]
    supernet = calibrated(made().eval(), declare, "W4A16", {"x": x})
    genome = supernet.space.encode(dict.fromkeys(supernet.space.names, "W4A16"))
    nearest, finished = supernet.extract(genome), jointopt.finish(supernet, genome, [{"x": x}], rounding).model
    assert sum(each.nbytes for each in tensors_of(finished).values()) == supernet.costs(genome)["size"]
    changed = set()
    for layer in supernet.family.layers:
        found = [finished.get_submodule(path).weight for path in (layer.path, *layer.tied)]
        assert all(each is found[0] for each in found)
        if not torch.equal(found[0], nearest.get_submodule(layer.path).weight):
            changed.add(layer.name)
    assert changed == {"head" if made is Repeated else "mix"}


class Encoder(nn.Module):
    """torch's own, which in eval mode would take nested tensors through one kernel for a whole block."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


def linear_layers_of(model: nn.Module) -> Family:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds) and "out_proj" not in path]
    return Family("own", (), (), tuple(Layer(path, path, path) for path in paths))


def test_torch_s_own_encoder_rounds_the_inputs_of_its_layers(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = Encoder().eval()
    batch = {"x": random(4, 6, 32), "attention_mask": torch.arange(6) < torch.tensor([[6], [5], [4], [3]])}
    supernet = calibrated(model, linear_layers_of, "W8A8", batch)
    genome = supernet.space.encode(dict.fromkeys(supernet.space.names, "W8A8"))
    rounded: list[Tensor] = []
    monkeypatch.setattr(QuantizedLinear, "_held", lambda self, x: rounded.append(x) or x)
    extracted = supernet.extract(genome)
    with torch.no_grad(), supernet.active(genome) as view:
        for each in (view, extracted, copy.deepcopy(extracted)):
            rounded.clear()
            each(**batch)
            assert len(rounded) == 4
        with supernet.active(supernet.space.encode(dict.fromkeys(supernet.space.names, "none"))) as whole:
            torch.testing.assert_close(whole(**batch), model(**batch))
    monkeypatch.undo()
    verification = jointopt.verify(jointopt.export(supernet, genome, tmp_path / "onnx", target="onnxruntime"))
    assert verification.ok, verification.differences


class Reading(nn.Module):
    """Reads the weight of a layer, and sends tokens to experts of which the batch may need but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.read = nn.ModuleList(nn.Linear(32, 32) for _ in range(2)), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for expert in self.experts[: 1 + int((x > 100).any())]:
            x = torch.relu(expert(x))
        return nn.functional.linear(x, self.read.weight)


def test_a_layer_whose_weight_is_read_and_that_is_never_called_is_refused():
    with pytest.raises(JointoptError, match=r"^read: the forward pass reads its weight and never calls it"):
        calibrated(Reading(), linear_layers_of, "W8A8", {"x": random(4, 6, 32)})


def test_an_expert_that_no_sample_reaches_is_left_alone():
    experts = declaring(*(Layer(path, path, path) for path in ("experts.0", "experts.1")))
    assert calibrated(Reading(), experts, "W8A8", {"x": random(4, 6, 32)}).calibrated


def test_the_output_layer_of_torch_s_attention_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4)})
    declare = declaring(Layer("out", "attention.out_proj", "out"))
    with pytest.raises(JointoptError, match=r"^attention\.out_proj: nn\.MultiheadAttention reads its weight and never"):
        SearchSpace.for_model(model, ["none", "W8A8"], family=declare)


class Mixture(nn.Module):
    """Each token goes to one expert, chosen by what comes out of a layer that is quantized too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.gate = nn.Linear(32, 32), nn.Linear(32, 3)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        chosen, mixed = self.gate(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mixed[chosen == index] = expert(x[chosen == index])
        return mixed


@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_experts_that_get_other_tokens_than_in_the_original_are_finished(rounding):
    torch.manual_seed(0)
    model, x = Mixture().eval(), random(16, 12, 32)
    supernet = calibrated(model, linear_layers_of, "W4A16", {"x": x})
    genome = supernet.space.encode(dict.fromkeys(supernet.space.names, "W4A16"))
    with torch.no_grad():
        nearest, finished = (
            float((each(x) - model(x)).norm())
            for each in (supernet.extract(genome), jointopt.finish(supernet, genome, [{"x": x}], rounding).model)
        )
    assert finished < nearest


class AddedRMSNorm(nn.Module):
    """Returns what it normalizes as well, which is the residual from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return nn.functional.rms_norm(residual, (32,), self.weight), residual


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(32, 32), AddedRMSNorm(), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, residual = self.norm(self.mix(x), x)
        return self.head(hidden + residual)


def test_a_normalization_may_return_more_than_what_it_normalized():
    supernet = calibrated(Added(), linear_layers_of, "W8A8", {"x": random(4, 6, 32)})
    assert supernet.costs(supernet.space.largest)["macs"] == 6 * (32 * 32 + 32 * 5)


class OneByOne(nn.Module):
    """Hands its layer one sample at a time, without the dimension of samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(each) for each in x])


@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_a_linear_layer_that_is_handed_one_vector_at_a_time_is_finished(rounding):
    torch.manual_seed(0)
    supernet = calibrated(OneByOne(nn.Linear(32, 8)), linear_layers_of, "W4A8", {"x": random(6, 32)})
    genome = supernet.space.encode({"layer.precision": "W4A8"})
    assert supernet.costs(genome)["macs"] == 32 * 8
    jointopt.finish(supernet, genome, [{"x": random(6, 32, seed=seed)} for seed in range(3)], rounding)


def test_a_convolution_that_is_handed_one_image_at_a_time_is_refused():
    with pytest.raises(
        JointoptError, match=r"^layer: found one image, \[32, 8, 8\]; allowed: images in a batch, \[N, C"
    ):
        calibrated(OneByOne(nn.Conv2d(32, 8, 3)), linear_layers_of, "W8A8", {"x": random(4, 32, 8, 8)})


def test_a_convolution_s_pixels_are_counted_image_by_image_too():
    model, images = nn.Conv2d(32, 8, 3), {"input": random(4, 32, 8, 6)}
    assert measure_positions(model, images).of == {"": 24}
    assert measure_positions(OneByOne(model), {"x": images["input"]}).of == {"layer": 24}


def test_an_embedding_that_rescales_its_own_rows_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(40, 32, max_norm=1.0), "head": nn.Linear(32, 5)})
    with pytest.raises(JointoptError, match=r"^own: embed has max_norm 1\.0, by which each look-up writes"):
        SearchSpace.for_model(model, ["none", "W8A8"], family=declaring(Layer("head", "head", "head")))
