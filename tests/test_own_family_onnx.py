"""A user's own model for ONNX Runtime: its inputs and outputs keep their names, and what has no form is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.checkpoint.onnx.session import OnnxModel
from jointopt.checkpoint.probe import probed
from tests.readme import own_model
from tests.test_own_family import PIXELS, ByKeyword, Recommender, declare_recommender


@pytest.fixture(scope="module")
def own() -> SimpleNamespace:
    return own_model()


def for_onnx(model: nn.Module, declared: Callable, batch: dict[str, torch.Tensor], **options) -> Supernet:
    schemes = ["none", "W8A8", "W8A8_STATIC", "W4A16"]
    space = SearchSpace.for_model(model, family=declared, schemes=schemes, precision_per="layer", **options)
    supernet = Supernet(model, space, family=declared)
    supernet.calibrate([batch])
    return supernet


def session_of(folder: Path) -> Callable:
    session = OnnxModel(folder / "model.onnx").session  # exact sums where a processor's own saturate
    return lambda **inputs: session.run(None, {name: each.numpy() for name, each in inputs.items()})


def test_its_export_for_onnx_runtime_computes_the_same_for_any_number_of_samples(own, tmp_path):
    pytest.importorskip("onnxruntime")
    supernet = for_onnx(own.mixer, own.declare, {"pixels": PIXELS}, depth=[3, 4], mlp=[32, 64, 128], mlp_keep=True)

    def closeness(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(PIXELS) - own.mixer(PIXELS)).square().mean())

    found = jointopt.search(supernet, closeness, evaluations=6, strategy="random").front()
    for at, genome in enumerate([supernet.space.largest, *found["genome"]]):
        folder = jointopt.export(supernet, genome, tmp_path / str(at), target="onnxruntime")
        verification = jointopt.verify(folder, quality=closeness)
        assert verification.ok, verification.differences
        extracted, run = supernet.extract(genome), session_of(folder)
        for count in (1, 3, 8):
            with torch.no_grad():
                torch.testing.assert_close(
                    torch.tensor(run(pixels=PIXELS[:count])[0]), extracted(PIXELS[:count]), atol=2e-3, rtol=1e-3
                )


@pytest.mark.parametrize("kind", [Recommender, ByKeyword])
def test_its_inputs_and_outputs_keep_their_names(tmp_path, kind):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    batch = {"weights": torch.rand(4, 5), "ids": torch.randint(0, 40, (4, 5), dtype=torch.int32)}
    supernet = for_onnx(kind(), declare_recommender, batch, mlp=[32, 64])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", target="onnxruntime")
    assert not jointopt.verify(folder).differences
    taste, total = session_of(folder)(**batch)
    with torch.no_grad():
        expected = supernet.extract(supernet.space.smallest)(**batch)
    torch.testing.assert_close(torch.tensor(taste), expected["taste"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(total), expected["total"])


class AfterAnother(Recommender):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict:
        taste = super().forward(ids, weights)["taste"]
        return {"doubled": 2 * taste, "logits": taste}


def test_logits_need_not_be_the_first_of_what_a_model_returns(tmp_path):
    pytest.importorskip("onnxruntime")
    batch = {"weights": torch.rand(4, 5), "ids": torch.randint(0, 40, (4, 5))}
    supernet = for_onnx(AfterAnother(), declare_recommender, batch, mlp=[32, 64])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", target="onnxruntime")
    assert not jointopt.verify(folder).differences
    labels = torch.zeros(4, dtype=torch.long)
    jointopt.train_supernet(supernet, [{**batch, "labels": labels}], steps=1)


class Listed(Recommender):
    """The same, its layers in a list of its own."""

    def __init__(self):
        super().__init__()
        self.layers = [self.items, self.up, self.down]

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        items, up, down = self.layers
        return down(torch.relu(up((items(ids) * weights[..., None]).sum(1))))


def test_layers_in_a_list_are_exported_in_their_formats(tmp_path):
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(1)
    batch = {"ids": torch.randint(0, 40, (4, 5)), "weights": torch.rand(4, 5)}
    supernet = for_onnx(Listed(), declare_recommender, batch, mlp=[32, 64])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", target="onnxruntime")
    assert not jointopt.verify(folder).differences
    stored = [each.data_type for each in onnx.load(folder / "model.onnx").graph.initializer if len(each.dims) > 1]
    assert stored and onnx.TensorProto.FLOAT not in stored


class Scaled(Recommender):
    """Takes what no normal number can stand for, an optional input, a plain value and a table without samples."""

    def forward(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        mask: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
        double: bool = False,
    ) -> torch.Tensor:
        rows = self.items(ids) + table
        pooled = (rows * weights[..., None].log()).sum(1) * (2 if double else 1)
        return self.down(torch.relu(self.up(pooled)))


def scaled_batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    weights, table = torch.rand(4, 5, generator=generator) + 0.1, torch.randn(5, 32, generator=generator)
    return {"ids": torch.randint(0, 40, (4, 5)), "weights": weights, "mask": None, "table": table, "double": True}


def test_values_that_are_no_tensors_stay_and_others_are_refused_by_the_export(tmp_path):
    pytest.importorskip("onnxruntime")
    batch = scaled_batch()
    supernet = for_onnx(Scaled(), declare_recommender, batch, mlp=[32, 64])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", target="onnxruntime")
    record = json.loads((folder / "jointopt.json").read_text())
    assert record["probe"]["inputs"]["double"] == {"value": True}
    verification = jointopt.verify(folder)
    assert verification.ok, verification.differences
    record["probe"]["outputs"][0] += 1
    (folder / "jointopt.json").write_text(json.dumps(record))
    assert not jointopt.verify(folder).ok
    extracted, loaded = supernet.extract(supernet.space.smallest), OnnxModel(folder / "model.onnx")
    with torch.no_grad():
        assert record["probe"]["largest"] == float(probed(extracted(**batch)).abs().max())
        expected = extracted(*batch.values())
    torch.testing.assert_close(loaded(*batch.values()), expected, atol=1e-3, rtol=1e-3)
    one = {name: each[:1] if name in ("ids", "weights") else each for name, each in batch.items()}
    torch.testing.assert_close(loaded(**one), expected[:1], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"double: found False; this export has it fixed as True"):
        loaded(**{**batch, "double": False})
    with pytest.raises(ValueError, match=r"mask: found a tensor of shape \(4, 5\); this export has it fixed as None"):
        loaded(**{**batch, "mask": torch.ones(4, 5)})


class Undecided(Recommender):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(ids, weights if float(weights.sum()) > 0 else -weights)


class Clashing(Recommender):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**super().forward(ids, weights), "weights": weights}


class Stubborn(Recommender):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(ids.view(4, 5), weights.view(4, 5))


class Asserting(Recommender):
    """Runs on as many samples as it is calibrated with, four, and on one more number."""

    def __init__(self, other: int):
        super().__init__()
        self.other = other

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        assert len(ids) in (4, self.other), "of another number"
        return super().forward(ids, weights)


class Tiring(Recommender):
    """Once it is tired it takes one sample at a time."""

    tired = False

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        assert len(ids) == 1 or not self.tired, "too many"
        return super().forward(ids, weights)


class Wordy(Recommender):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict:
        return {**super().forward(ids, weights), "words": ["some"]}


class Classy(Recommender):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(**super().forward(ids, weights))


def test_what_cannot_be_traced_is_refused_in_one_line_and_leaves_nothing(tmp_path):
    pytest.importorskip("onnxruntime")
    batch = {"ids": torch.randint(0, 40, (4, 5)), "weights": torch.rand(4, 5)}
    for model, match in (
        (Undecided(), r"export: torch.onnx cannot trace Undecided: .*"),
        (Clashing(), r"export: weights is an input and an output; allowed: names of their own"),
        (Stubborn(), r"export: Stubborn does not run on one calibration sample: shape"),
        (Asserting(4), r"export: Asserting does not run on one calibration sample: of another number"),
        (Asserting(1), r"export: Asserting does not run on two samples: of another number"),
        (Wordy(), r"export: the model returns .*words.*list.*; allowed: a tensor, or a tuple or dict of tensors"),
        (Classy(), r"export: the model returns .*SimpleNamespace; allowed: a tensor, or a tuple or "),
    ):
        supernet = for_onnx(model, declare_recommender, batch, mlp=[32, 64])
        with pytest.raises(JointoptError, match=match) as caught:
            jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", target="onnxruntime")
        assert "\n" not in str(caught.value)
    supernet.samples[0]["names"] = ["some"]
    with pytest.raises(JointoptError, match=r"export: names is a list; allowed: tensors, and numbers, text or None"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", target="onnxruntime")
    supernet = for_onnx(Tiring(), declare_recommender, batch, mlp=[32, 64])
    supernet.model.tired = True
    with pytest.raises(JointoptError, match=r"export: Tiring does not run on a calibration batch: too many"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", target="onnxruntime")
    assert not list(tmp_path.iterdir())


class Halved(Recommender):
    """With one layer in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up.bfloat16()

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = (self.items(ids) * weights[..., None]).sum(1)
        return {"taste": self.down(torch.relu(self.up(pooled.bfloat16()).float()))}


def test_a_layer_in_half_precision_among_others_is_refused(tmp_path):
    batch = {"ids": torch.randint(0, 40, (4, 5)), "weights": torch.rand(4, 5)}
    supernet = for_onnx(Halved(), declare_recommender, batch, mlp=[32, 64])
    with pytest.raises(JointoptError, match=r"up\.weight is torch\.bfloat16; allowed: float32"):
        jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="onnxruntime")
