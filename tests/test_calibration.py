"""Calibration: which batches it refuses, what it leaves out of them, and how long what it found holds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from tests.zoo import batches, logits, make, supernet_of


def test_calibration_batches_that_the_model_does_not_take_are_refused_with_what_it_takes():
    model = make("timm_vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    with pytest.raises(JointoptError, match="calibrate: found a NoneType; allowed: batches"):
        supernet.calibrate(None)
    images = batches("timm_vit")[0]["x"]
    said = "calibrate: the model does not run on a batch of pixels: .*; allowed: what its forward takes, x"
    with pytest.raises(JointoptError, match=said):
        supernet.calibrate([{"pixels": images}])
    with pytest.raises(JointoptError, match="a batch of x: .* to have 3 channels, but got 1"):
        supernet.calibrate([{"x": images[:, :1]}])
    with pytest.raises(JointoptError, match=r"a batch of x: Input height \(12\) doesn't match model"):  # it asserts so
        supernet.calibrate([{"x": images[:, :, :12, :12]}])


def test_inputs_that_cannot_be_cut_to_an_average_length_are_told_in_one_line():
    ids, mask = torch.full((2, 8), 7), torch.ones(2, 8, dtype=torch.long)
    mask[1, 4:] = 0
    supernet = supernet_of("bert", ["none", "W8A8"], preset="fixed")
    kinds = torch.zeros(8, dtype=torch.long)
    with pytest.raises(JointoptError, match=r"average length.*input_ids \[2, 6\].*allowed: inputs with one entry"):
        supernet.calibrate([{"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}])


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC"])
def test_samples_that_are_not_finite_are_refused_and_leave_nothing_behind(scheme):
    refused, fresh = (Supernet(make("vit"), SearchSpace.for_model(make("vit"), schemes=[scheme])) for _ in range(2))
    wrong = batches("vit", seed=1)
    wrong[0]["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(JointoptError, match="o_proj: calibration saw inputs that are not finite; allowed: finite"):
        refused.calibrate(wrong)
    for supernet in (refused, fresh):
        supernet.calibrate(batches("vit"))
    assert refused.fingerprint() == fresh.fingerprint()


def test_a_batch_of_padding_alone_is_refused():
    batch = batches("bert")[0]
    supernet = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["W8A8"]))
    with pytest.raises(JointoptError, match="calibrate: found a batch of padding alone"):
        supernet.calibrate([{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "mse", "entropy"])
def test_ranges_of_activations_by_every_method_leave_padding_out(method):
    padded = batches("bert", count=2)
    other = [
        {**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], b["input_ids"].flip(0))}
        for b in padded
    ]
    found = []
    for seen in (padded, other):
        model = make("bert")
        space = SearchSpace.for_model(model, schemes=["W8A8_STATIC", "FP8"], preset="fixed")
        supernet = Supernet(model, space, activation_calibration=method)
        supernet.calibrate(seen)
        found.append(supernet)
    for key in found[0]._measured_constants:
        for name, value in found[0]._measured_constants[key].items():
            torch.testing.assert_close(
                found[1]._measured_constants[key][name].float(), value.float(), rtol=0.03, atol=0
            )


@pytest.mark.parametrize("change", ["load_state_dict", "an optimizer"])
def test_weights_that_someone_changed_are_noticed(change):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]))
    supernet.calibrate(batches("vit"))
    genome, batch = supernet.space.largest, batches("vit")[0]
    with supernet.active(genome) as view:
        before = logits(view, batch)
    assert supernet.calibrated and not supernet.trained
    if change == "load_state_dict":
        supernet.model.load_state_dict({k: 2 * v for k, v in supernet.model.state_dict().items()})
    else:
        optimizer = torch.optim.SGD(supernet.model.parameters(), lr=0.1)
        supernet.model(**batch).logits.square().sum().backward()
        optimizer.step()
    with pytest.raises(JointoptError, match="search: the super-network is not calibrated"):
        jointopt.search(supernet, lambda view: 1.0, evaluations=3)
    with supernet.active(genome) as view:
        noticed = logits(view, batch)
    assert not supernet.calibrated and supernet.trained
    supernet.calibrate(batches("vit"))
    with supernet.active(genome) as view:
        fresh = logits(view, batch)
    assert torch.equal(noticed, fresh) and not torch.equal(before, fresh)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda supernet: pickle.loads(pickle.dumps(supernet))])
def test_a_copy_stays_calibrated(how):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A8"]))
    supernet.calibrate(batches("vit"))
    other = how(supernet)
    for each in (supernet, other):
        with each.active(each.space.largest) as view:
            logits(view, batches("vit")[0])
        assert each.calibrated


def test_a_restored_super_network_has_no_calibration_of_the_weights_before(tmp_path):
    model = make("bert")
    space = SearchSpace.for_model(model, schemes=["W8A8_STATIC"])
    fresh, other = (Supernet(model, space, repair=True) for _ in range(2))
    fresh.save(tmp_path / "supernet.safetensors")
    other.calibrate(batches("bert"))
    other.load(tmp_path / "supernet.safetensors")
    assert other.fingerprint() == fresh.fingerprint()
    with pytest.raises(JointoptError, match="W8A8_STATIC needs ranges of activations; call calibrate"):
        other.extract(space.smallest)


def test_what_was_calibrated_follows_a_model_that_is_moved_to_another_device():
    model = make("resnet")
    space = SearchSpace.for_model(model, schemes=["W8A8_STATIC"])
    supernet = Supernet(model, space, repair=True)
    supernet.calibrate(batches("resnet"))
    supernet.model.to("meta")  # as the Trainer and accelerate move it to an accelerator
    view = supernet.training_view(space.smallest)
    constants = [each for held in supernet._measured_constants.values() for each in held.values()]
    repaired = [each for pair in supernet._repaired.values() for each in pair if each is not None]
    kept = [each for batch in supernet.samples for each in batch.values()]
    held = [*view.parameters(), *constants, *repaired, *kept]
    assert constants and repaired and kept and {each.device.type for each in held} == {"meta"}
