"""BatchNorm statistics of a sub-network, estimated anew (Once-for-All, arXiv 1908.09791, section 3.4).

The running mean and variance of the whole network are wrong for a slice of it, whose channels see other sums. Where
all channels and blocks stay and only numbers are rounded, they are nearly right: there the samples tell by how much
they move, so that the noise of few samples does not enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jointopt.arithmetic import own_arithmetic
from jointopt.batches import sample_count

SAMPLES = 128
"""Statistics are estimated from batches until they hold this many samples. On a ResNet of scikit-learn's digits,
accuracies from different drawings of 32, 64, 128, 256 and 512 samples had a standard deviation of 1.0, 0.5, 0.3, 0.3
and 0.2 points."""


def has_batch_norm(model: nn.Module) -> bool:
    """Whether its sub-networks' statistics have to be estimated anew."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def keep_statistics(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Gives every normalization running statistics of its own, so that a slice's do not enter the whole model's."""
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]
    for norm in norms:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            norm._buffers[name] = torch.clone(norm._buffers[name])  # type: ignore[arg-type]
    return norms


@torch.no_grad()
@own_arithmetic()
def reestimate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the running statistics by the averages over `batches`, each sample alike, in buffers of the model's own.

    The model is in eval mode and stays so: only its normalizations see the batches as training would show them.
    """
    norms = keep_statistics(model.modules())
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.training = True
    seen = 0
    for batch in batches:
        count = sample_count(batch)
        seen += count
        for norm in norms:
            norm.momentum = count / seen
        model(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.training = False


Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Path of a normalization -> its running mean and variance."""


def running_statistics(model: nn.Module) -> Statistics:
    """Path -> running mean and variance, of the normalizations that keep them."""
    norms = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {path: (m.running_mean, m.running_var) for path, m in norms.items() if m.running_mean is not None}  # type: ignore[misc]


@torch.no_grad()
def move(model: nn.Module, given: Statistics, estimated: Statistics) -> None:
    """Sets the statistics to `given`, shifted by how much they changed from `estimated` on the same samples: means by
    the difference, variances by the ratio.

    Args:
        model: its statistics have just been estimated on some samples.
        given: statistics of the network that it was made from.
        estimated: that network's, from the same samples.

    A control variate: with it a ResNet in W8A8 diverges from the original by 0.00014, with the samples' own statistics
    by 0.031 (KL of `scripts/bench/transforms.py --case resnet`).
    """
    for path, (mean, variance) in running_statistics(model).items():
        (given_mean, given_variance), (estimated_mean, estimated_variance) = given[path], estimated[path]
        mean.add_(given_mean - estimated_mean)
        ratio = given_variance / estimated_variance
        variance.copy_(torch.where(estimated_variance > 0, variance * ratio, variance))


@torch.no_grad()
def shift_by_whole_products(layer: Any, norm: Any) -> None:
    """Rounds what a normalization adds to a whole number of the products that the layer before it sums up, where these
    are products of integers with static scales.

    Integer kernels add a bias as such a number (Jacob et al., arXiv 1712.05877, section 2.4), so that a kernel that
    computes layer, normalization and the rounding after it at once gives what is computed here.
    """
    form = layer.scheme.activations
    if form is None or form.kind.is_float or form.dynamic or norm.bias is None or norm.bias.dtype != torch.float32:
        return
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    product = layer.input_scale.double() * layer.quantized.effective_scale().double().reshape(-1) * factor
    centre = norm.running_mean.double() * factor
    shift = norm.bias.double() - centre
    whole = torch.where(product == 0, shift, (shift / product).round() * product)
    norm._parameters["bias"] = nn.Parameter((whole + centre).float(), requires_grad=norm.bias.requires_grad)
