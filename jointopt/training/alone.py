"""Trains one sub-network alone: quantization-aware, distilled from the whole model.

What super-network training must share between sub-networks, the chosen one gets back when it is trained by itself for
some hundred steps (Minitron, arXiv 2407.14679; Puzzle, arXiv 2411.19146). It computes in its number formats from the
first step on, with scales chosen from the weights as they are and, if wanted, a learned factor for each of them and of
static inputs' (LSQ, arXiv 1902.08153), so that what the last step trained is what is exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from torch import Tensor, nn

from jointopt.batches import check_batch, on_device, without_labels
from jointopt.outputs import REGRESSION, logits_of, problem_of, without_cache
from jointopt.supernet.subnetwork import Holder, Plan, detach, quantize_tied, renaming
from jointopt.supernet.weight_bank import BankedWeight
from jointopt.training.distillation import soft_labels
from jointopt.training.loop import Batches, check_batches, endless, schedule
from quant.calibration import choose_clip, static_constants
from quant.errors import JointoptError, said_of
from quant.formats import Scheme
from quant.kernels import quantize_and_hold
from quant.learned_ranges import ends, factors, has_learnable_inputs, input_range, is_learnable, widened
from search_spaces.clones import structural_clone

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

PACE = 5
"""How much faster than weights, by share, ranges move, since these trainings have some hundred steps and not LSQ's 90
epochs. Where rounding costs little no pace up to 5 mattered, and 10 was a little worse; SmolLM2 with INT4 rows, trained
for 48 steps, had a divergence of 1.30 with fixed ranges, 1.20 at pace 1, 1.03 at 3 and 0.85 at 10."""


@torch.inference_mode(False)
def train_alone(
    supernet: Supernet,
    plan: Plan,
    batches: Batches,
    steps: int,
    learning_rate: float,
    seed: int,
    learned_ranges: bool,
    progress: bool,
) -> nn.Module:
    """The quantized sub-network of a plan, after some steps of AdamW on the divergence of its logits from the whole
    model's: the original's or, where the super-network was trained, its own.

    Normalizations keep the statistics that the search gave them, and there is no dropout. A quantized cache is left out
    while training, and there again afterwards.

    Args:
        batches: as `train_supernet` takes them; labels are not used.
        seed: of the order of batches.
        learned_ranges: whether a factor of the range of each scale of weights and of static inputs, as the
            super-network has it, is trained as well.

    Raises:
        JointoptError: no batch, a loss that is not finite.
    """
    check_batches("finish", batches)
    problem = problem_of(supernet.model)
    trained = detach(supernet.renormalized(supernet.built(replace(plan, schemes={}, caches={})), plan))
    renamed = renaming(supernet.family, plan)
    layers = {renamed(path): path for path in plan.schemes}
    ranges = _ranges(trained, supernet, plan, layers) if learned_ranges else _Ranges({}, {})
    parameters = [*trained.parameters(), *ranges.weights.values(), *ranges.inputs.values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    numbered = zip(range(steps), endless("finish", batches, seed, 0), strict=False)
    with _whole(supernet) as teacher, torch.enable_grad(), without_cache(teacher), without_cache(trained):
        for step, batch in track(numbered, "finishing", total=steps, disable=not progress):
            check_batch("finish", batch)
            inputs = without_labels(on_device(batch, supernet.device))
            with torch.no_grad():
                target = logits_of(teacher, inputs)
            if target.shape[-1] == 1 and problem is None:
                raise JointoptError(
                    "finish: steps: found logits of a single output, which are no distribution to learn; allowed: "
                    f"config.problem_type {REGRESSION!r} of a model of transformers, rounding, or training before the "
                    "search"
                )
            view = _quantized(structural_clone(trained).eval(), supernet, plan, layers, ranges, training=True)
            loss = soft_labels(logits_of(view, inputs), target, inputs.get("attention_mask"), problem=problem)
            if not torch.isfinite(loss):
                raise JointoptError(f"finish: the loss is {loss.item()}; a smaller learning_rate may help")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    finished = detach(supernet.built(replace(plan, schemes={})))
    finished.load_state_dict({**finished.state_dict(), **trained.state_dict()})
    finished = _quantized(finished, supernet, plan, layers, ranges, training=False)
    return detach(supernet.with_whole_shifts(finished, plan)).requires_grad_(False)


@dataclass(frozen=True)
class _Ranges:
    """What is trained of ranges: path -> values that begin as 0.

    Attributes:
        weights: of each of a layer's scales, [1 or 2, rows, scales a row].
        inputs: of a layer's static inputs, [1 or 2, 1, 1].
    """

    weights: Mapping[str, nn.Parameter]
    inputs: Mapping[str, nn.Parameter]


def _ranges(model: nn.Module, supernet: Supernet, plan: Plan, layers: Mapping[str, str]) -> _Ranges:
    weights, inputs = {}, {}
    holders = {layer.path: layer.paths for layer in supernet.family.layers}
    for name, path in layers.items():
        scheme, weight = plan.schemes[path], model.get_submodule(name).get_parameter("weight")
        assert scheme.weights is not None
        if is_learnable(scheme.weights):
            scales = choose_clip(weight, scheme.weights)[0].shape
            weights[path] = nn.Parameter(
                torch.zeros(ends(scheme.weights), *scales, dtype=torch.float32, device=weight.device)
            )
        if has_learnable_inputs(scheme):
            assert scheme.activations is not None
            for each in holders[path]:
                if supernet.constants(each, scheme):
                    inputs[each] = nn.Parameter(
                        torch.zeros(ends(scheme.activations), 1, 1, dtype=torch.float32, device=weight.device)
                    )
    return _Ranges(weights, inputs)


@contextmanager
def _whole(supernet: Supernet) -> Iterator[nn.Module]:
    """What is learned from. A super-network may have been trained for a task that the original does not know."""
    if supernet.trained:
        yield supernet.built(Plan(supernet.family.blocks))
        return
    with supernet.original() as original:
        yield original


def _quantized(
    model: nn.Module,
    supernet: Supernet,
    plan: Plan,
    layers: Mapping[str, str],
    ranges: _Ranges,
    training: bool,
) -> nn.Module:
    """The model with its layers as the plan's schemes hold them, weights tied before tied again."""
    owners = {layer.path: layer for layer in supernet.family.layers}
    for name, path in layers.items():
        scheme = plan.schemes[path]
        weight = model.get_submodule(name).get_parameter("weight")
        factor = _factor(ranges.weights.get(path), weight)
        banked = _rounded(weight.detach(), scheme, supernet, path, factor)
        holders = []
        for each, original in [(name, path), *((other, other) for other in owners[path].tied)]:
            constants, of_inputs = supernet.constants(original, scheme), _factor(ranges.inputs.get(original), weight)
            if of_inputs is not None:
                assert scheme.activations is not None
                clip = widened(input_range(scheme.activations, constants), of_inputs.detach().flatten(1))
                constants = static_constants(clip, scheme.activations)
            holders.append(Holder(model.get_submodule(each), constants, factor, of_inputs))
        quantize_tied(holders, scheme, banked, None, None, training)
    return model


def _factor(values: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if values is None else factors(values, weight[0].numel(), PACE)


def _rounded(weight: Tensor, scheme: Scheme, supernet: Supernet, path: str, factor: Tensor | None) -> BankedWeight:
    assert scheme.weights is not None
    with said_of(f"finish: {path}"):
        clip = supernet.clip(path, scheme, weight, factor=factor)
        return BankedWeight(*quantize_and_hold(weight, scheme.weights, clip))
