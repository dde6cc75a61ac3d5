"""BatchNorm's statistics where only numbers are rounded: the original's own, moved by what rounding changes."""

from __future__ import annotations

import pytest
import torch

from jointopt import JointoptError, SearchSpace, Supernet
from tests.zoo import batches, logits, make


def supernet_in(scheme: str, count: int) -> tuple[Supernet, torch.nn.Module]:
    model = make("resnet")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=[scheme], preset="fixed"))
    supernet.calibrate(batches("resnet", count=count))
    return supernet, model


def test_eight_bits_leave_the_original_as_it_is_however_few_the_samples():
    supernet, model = supernet_in("W8A16_CHANNEL", 1)
    batch = batches("resnet", seed=1)[0]
    expected = logits(model, batch)
    with supernet.active(supernet.space.largest) as view:
        assert (logits(view, batch) - expected).abs().max() < 0.02 * expected.abs().max()


def of_sizes(pixels: torch.Tensor, *sizes: int) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": part} for part in pixels.split(list(sizes))]


@pytest.mark.parametrize("sizes", [(3, 1), (1, 1, 1, 1), (1, 3), (1, 2, 1)])
def test_a_sample_alone_in_its_batch_is_estimated_from_with_its_neighbours(sizes):
    model = make("resnet")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    supernet.calibrate(of_sizes(torch.randn(4, 3, 8, 8), *sizes))  # its last maps are of one pixel
    with supernet.active(supernet.space.smallest) as view:
        assert torch.isfinite(logits(view, of_sizes(torch.randn(2, 3, 8, 8), 2)[0])).all()


def test_statistics_of_a_single_sample_are_refused():
    model = make("resnet")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]))
    with pytest.raises(JointoptError, match="found one sample; allowed: two or more"):
        supernet.calibrate(of_sizes(torch.randn(1, 3, 8, 8), 1))


def test_statistics_follow_what_rounding_does_to_the_weights():
    supernet, model = supernet_in("W4A16_CHANNEL", 2)
    with supernet.active(supernet.space.largest) as view, torch.no_grad():
        inputs = torch.cat([batch["pixel_values"] for batch in batches("resnet", count=2)])
        stem, given = view.resnet.embedder.embedder, model.resnet.embedder.embedder
        moved = (stem.convolution(inputs) - given.convolution(inputs)).mean((0, 2, 3))
        expected = given.normalization.running_mean + moved
        torch.testing.assert_close(stem.normalization.running_mean, expected, atol=1e-4, rtol=1e-3)


def test_a_channel_that_never_varies_keeps_finite_statistics():
    model = make("resnet")
    with torch.no_grad():
        model.resnet.embedder.embedder.convolution.weight[3] = 0
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["W8A16_CHANNEL"], preset="fixed"))
    supernet.calibrate(batches("resnet"))
    with supernet.active(supernet.space.largest) as view:
        assert torch.isfinite(logits(view, batches("resnet", seed=1)[0])).all()


def test_under_static_integers_a_normalization_adds_whole_products():
    supernet, _ = supernet_in("W8A8_STATIC_ASYM", 2)
    with supernet.active(supernet.space.largest) as view:
        layer, norm = view.resnet.embedder.embedder.convolution, view.resnet.embedder.embedder.normalization
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    product = layer.input_scale.double() * layer.quantized.scale.double()[:, 0] * factor
    whole = (norm.bias.double() - norm.running_mean.double() * factor) / product
    assert (whole - whole.round()).abs().max() < 0.02 and whole.abs().max() > 100
