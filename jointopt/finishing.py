"""Finishing: the chosen sub-network rounded anew, or trained alone, before it is exported.

While searching, weights are rounded to nearest. A finished sub-network has the same plan, the same formats and the
same size; only codes and biases are others (of a trained one, also weights that are not quantized). Rounding anew goes
layer after layer, each on the inputs that it gets from the layers finished before it, towards the outputs that it has
where nothing is quantized: so what earlier layers lost is made good as far as a weight can.

    finished = jointopt.finish(supernet, genome, batches)
    finished = jointopt.finish(supernet, genome, training_batches, steps=500)
    jointopt.export(supernet, finished, "bert-small")
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from quant.errors import JointoptError, check_above_0, check_count, check_whole, did_you_mean
from quant.formats import Scheme
from quant.layers import held_input
from quant.reference import Clip
from quant.rounding.descent import descent
from quant.rounding.gptq import gptq
from quant.rounding.moments import NEVER_REACHED, InputMoments, joined
from quant.rounding.recovery import recovered

from .batch_norm import on_device
from .choice import front_of, within
from .evaluation import Quality, check_batch, measured
from .lockstep import Arrived, in_step
from .objectives import COSTS
from .subnetwork import Plan, detach, quantize_layer, renamed
from .training.alone import train_alone
from .training.loop import Batches
from .weight_bank import BankedWeight

if TYPE_CHECKING:
    from .study import Study
    from .supernet import Supernet

ROUNDINGS = {"gptq": gptq, "descent": descent}

Halves = tuple[InputMoments, InputMoments]


@dataclass(frozen=True)
class Finishing:
    """How sub-networks are finished.

    Attributes:
        rounding: "gptq"; or "descent", which goes on from it column by column and takes about three times as long.
        steps: of training in place of such a rounding, None for none.
        learning_rate, seed: of the training.
        learned_ranges: whether ranges of weights' scales and static inputs are trained too (LSQ, arXiv 1902.08153).
        data: of the training, what tells its batches from others, for a study that records what came of it.
    """

    rounding: str = "gptq"
    steps: int | None = None
    learning_rate: float = 1e-4
    seed: int = 0
    learned_ranges: bool = False
    data: str = ""

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            hint = did_you_mean(self.rounding, ROUNDINGS)
            raise JointoptError(f"rounding: found {self.rounding!r}{hint}; allowed: {', '.join(ROUNDINGS)}")
        check_count("finish: steps", self.steps)
        check_above_0("finish: learning_rate", self.learning_rate)
        check_whole("finish: seed", self.seed)
        if self.learned_ranges and self.steps is None:
            raise JointoptError("finish: found learned_ranges without steps; allowed: both, or neither")

    @property
    def name(self) -> str:
        """Under which a study records it: "gptq", "descent", "trained-500-1f2e3d", "learned-500-1f2e3d". The last part
        tells other rates, seeds and data apart."""
        if self.steps is None:
            return self.rounding
        settings = f"{self.learning_rate!r} {self.seed} {self.data}"
        digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
        return f"{'learned' if self.learned_ranges else 'trained'}-{self.steps}-{digest}"


@dataclass(frozen=True)
class Finished:
    """A sub-network with its last weights.

    Attributes:
        genome: canonical.
        rounding: how its weights were made: `Finishing.name`.
        model: the sub-network, which shares no tensor with the super-network.
        metrics: what `quality` measured of it, and costs; None where no quality was given.
        seconds: taken by the rounding or the training.
    """

    genome: np.ndarray
    rounding: str
    model: nn.Module
    metrics: dict[str, float] | None
    seconds: float


def finish(
    supernet: Supernet,
    genome: Any,
    batches: Batches,
    rounding: str = "gptq",
    quality: Quality | None = None,
    *,
    steps: int | None = None,
    learning_rate: float = 1e-4,
    seed: int = 0,
    learned_ranges: bool = False,
) -> Finished:
    """Gives one sub-network its last weights: rounded by the expensive method, or trained.

    Rounding runs every batch's forward pass twice, side by side in the sub-network and in its unquantized self: layers
    whose inputs are not rounded are fitted to the outputs there (from two samples on) before they are rounded. Memory
    is that of the sub-network, one block's activations of both for all batches, and one layer's Hessians, of both
    halves of the samples. Layers that are not quantized, and embeddings, stay as the search scored them. Where a layer
    has a bias, it takes up the mean of the layer's error. Training is of all of the sub-network's weights, on the
    divergence of its logits from the whole model's, in its number formats (`training.alone`).

    Args:
        supernet: calibrated. It stays as it is.
        batches: dicts of what the model's forward takes, such as those it was calibrated with, in a list or whatever
            gives them once; "labels" are left out, and padding (where the attention mask is 0) does not count. To
            train: a list of many, or a function from the epoch's number to an iterable of them.
        rounding: "gptq"; or "descent", which goes on from it column by column and takes about three times as long.
        quality: scores the finished sub-network: `Finished.metrics`.
        steps: of training, in place of the rounding; with `learning_rate` (AdamW's, 10% warm-up, then a cosine) and
            `seed` (of the order of batches).
        learned_ranges: of that training: whether ranges of weights' scales and static inputs are trained too (LSQ,
            arXiv 1902.08153).

    Raises:
        JointoptError: an unknown rounding, no batch, a layer that no batch reaches, a Hessian that cannot be used,
            weights that were trained since the calibration that it needs; with the layer's name.
    """
    how = Finishing(rounding, steps, learning_rate, seed, learned_ranges)
    return finish_by(how, supernet, genome, batches, quality)


def finish_by(
    how: Finishing,
    supernet: Supernet,
    genome: Any,
    batches: Batches,
    quality: Quality | None = None,
    progress: bool = False,
) -> Finished:
    """`finish`, as `how` says."""
    started = time.perf_counter()
    genome = supernet.space.canonical(genome)
    plan = supernet.plan(genome)
    supernet.check_calibrated(plan)
    if quality is not None and not callable(quality):
        raise JointoptError(f"finish: quality: found {quality!r}; allowed: a function of a model")
    if how.steps is not None:
        model = train_alone(
            supernet, plan, batches, how.steps, how.learning_rate, how.seed, how.learned_ranges, progress
        )
    elif callable(batches) or not isinstance(batches, Iterable):
        found = "function of epochs" if callable(batches) else type(batches).__name__
        raise JointoptError(f"finish: found a {found} to round by {how.rounding}; allowed: a list of batches")
    else:
        model = _rounded_anew(supernet, plan, batches, how.rounding)
    seconds = time.perf_counter() - started
    metrics = None
    if quality is not None:
        costs = {name: float(value) for name, value in supernet.costs(genome).items()}
        metrics = {**costs, **measured(quality, model)}
    return Finished(genome, how.name, model, metrics, seconds)


def _rounded_anew(supernet: Supernet, plan: Plan, batches: Iterable[Mapping[str, Any]], rounding: str) -> nn.Module:
    """The sub-network of a plan, its layers rounded one after the other."""
    moved = []
    for batch in batches:
        check_batch("finish", batch)
        moved.append({k: v for k, v in on_device(batch, supernet.device).items() if k != "labels"})
    if not moved:
        raise JointoptError("finish: found no batch; allowed: one or more dicts of the model's inputs")
    modules = dict(supernet.model.named_modules())
    rounded = {p: s for p, s in plan.schemes.items() if not isinstance(modules[p], nn.Embedding)}
    bare = replace(plan, schemes={p: s for p, s in plan.schemes.items() if p not in rounded})
    shell = supernet.renormalized(supernet.built(bare), plan)
    original = supernet.view(replace(plan, schemes={}, caches={}))
    names = {renamed(path, supernet.family, plan.blocks): path for path in rounded}
    left = dict(names)
    shared = _SharedMoments()

    def change(name: str, module: nn.Module, arrived: Arrived) -> None:
        path = left.pop(name)
        scheme, constants = rounded[path], supernet.statistics(path, rounded[path])
        try:
            halves = shared.of(module, scheme, constants, arrived)
            weight, shift = _rounded(module, scheme, halves, partial(supernet.clip, path, scheme), rounding)
        except JointoptError as error:
            raise JointoptError(f"finish: {path}: {error}") from None
        quantize_layer(module, scheme, weight, None, None, constants)
        if shift is not None:
            module._parameters["bias"] = nn.Parameter(module.get_parameter("bias") + shift, requires_grad=False)

    with _without_cache(shell), _without_cache(original):
        in_step(shell, moved, names, change, original)
    if left:
        raise JointoptError(f"finish: {next(iter(left.values()))}: {NEVER_REACHED}")
    return detach(supernet.renormalized(shell, plan))


def finish_top(
    supernet: Supernet,
    study: Study,
    batches: Batches,
    quality: Quality,
    wanted: Mapping[str, Any],
    how: Finishing = Finishing(),
    top: int = 3,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[np.ndarray, Finished | None]:
    """Finishes the point of the front that `wanted` chooses and its nearest neighbours, and chooses again.

    What the study has of an earlier call is not scored again.

    Args:
        wanted: keywords of `Study.best`.
        tell: called with a line for each sub-network that was finished.

    Returns:
        The chosen genome, and what finishing made of it; None where it is no better than rounding to nearest.
    """
    kept: Finished | None = None
    for genome in _nearest_on_front(study, study.best(**wanted), top):
        made = finish_recorded(supernet, study, genome, batches, quality, how)
        if made is not None:
            tell(_told(study, made))
            if np.array_equal(made.genome, study.best(**wanted, finished=how.name)):
                kept = made
    genome = study.best(**wanted, finished=how.name)
    return genome, better_finished(supernet, study, genome, batches, how, kept)


def finish_recorded(
    supernet: Supernet,
    study: Study,
    genome: np.ndarray,
    batches: Batches,
    quality: Quality,
    how: Finishing,
) -> Finished | None:
    """Finishes and scores a genome, and records it; None where the study has it already."""
    if _recorded(study, genome, how.name) is not None:
        return None
    made = finish_by(how, supernet, genome, batches, quality, progress=how.steps is not None)
    assert made.metrics is not None
    study.add_finished(genome, how.name, made.metrics, made.seconds)
    return made


def better_finished(
    supernet: Supernet,
    study: Study,
    genome: np.ndarray,
    batches: Batches,
    how: Finishing,
    kept: Finished | None = None,
) -> Finished | None:
    """What finishing makes of a genome, with the metrics that the study has of it; None where its quality is no better
    than that of its evaluation, or the study has none. `kept` is one that need not be made again."""
    record, evaluated = _recorded(study, genome, how.name), study.results(genome[None])[0]
    first = study.quality
    if record is None or not evaluated or record[first.name] * first.sign >= evaluated[first.name] * first.sign:
        return None
    if kept is not None and np.array_equal(kept.genome, genome):
        return kept
    return replace(finish_by(how, supernet, genome, batches), metrics=record)


def _recorded(study: Study, genome: np.ndarray, rounding: str) -> dict[str, float] | None:
    """Metrics that the study has of a finished genome."""
    key = (genome.tolist(), rounding)
    return next((r["metrics"] for r in study.finished() if (r["genome"], r["rounding"]) == key), None)


def _told(study: Study, made: Finished) -> str:
    name = study.quality.name
    before = (study.results(made.genome[None])[0] or {}).get(name, float("nan"))
    after = (made.metrics or {}).get(name, float("nan"))
    return f"finished ({made.rounding}, {made.seconds:.0f} s): {name} {before:.4g} -> {after:.4g}"


def _nearest_on_front(study: Study, genome: np.ndarray, top: int) -> list[np.ndarray]:
    """The genome and its `top` - 1 neighbours on the front of those that keep to the study's constraints, from small to
    large; of two as near, the smaller first. The genome itself need not be on it: a wish for what is no objective."""
    frame = study.evaluations()
    frame = within(frame[frame["failed"].isna()], study.constraints)
    near = pd.concat([front_of(frame, study.objectives), frame[frame["genome"] == tuple(genome)]])
    costs = [o.name for o in study.objectives if o.name in COSTS]
    near = near.drop_duplicates("genome").sort_values(costs[0] if costs else study.quality.name, kind="stable")
    at = near["genome"].tolist().index(tuple(genome))
    nearest = sorted(range(len(near)), key=lambda index: abs(index - at))[:top]
    return [np.array(near["genome"].iloc[index], dtype=np.int64) for index in nearest]


def _rounded(
    module: nn.Module, scheme: Scheme, halves: Halves, clip_of: Callable[[Tensor, Tensor], Clip], rounding: str
) -> tuple[BankedWeight, Tensor | None]:
    """A layer's weight rounded for its inputs, fitted to the original's before, and what its bias gains, if it has one.

    Ranges are chosen as in the search. The clipping that has the least squared error alone is not the best one here:
    errors that go on to later columns need the room (ViT of the digits, NVFP4A16: KL 8.4e-5 by MSE, 3.2e-5 by
    min-max).
    """
    weight = module.get_parameter("weight").detach()
    assert scheme.weights is not None
    has_bias = module._parameters.get("bias") is not None
    moments = joined(halves)
    hessian = moments.hessian(centred=has_bias)
    energy = hessian.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(weight) // len(hessian), 0)
    target = recovered(weight, halves, centred=has_bias)
    quantized = ROUNDINGS[rounding](target, hessian, scheme.weights, clip_of(target, energy))
    values = quantized.dequantize(weight.dtype)
    shift = None
    if has_bias:
        whole, held = (each.float().flatten(1).unflatten(0, (len(hessian), -1)) for each in (weight, values))
        lost = whole @ moments.original_mean()[..., None] - held @ moments.mean()[..., None]
        shift = lost.flatten().to(weight.dtype)
    return BankedWeight(quantized, values), shift


class _SharedMoments:
    """The moments of the layer before, of every other sample and of the rest, which are also this one's where the same
    tensors come in (q, k, v).

    What the original gets counts for weights alone: where inputs are rounded, most of what they lost is the noise of
    this rounding, for which no weight can make up (ViT of the digits, W4A4: KL 4.6e-3 without it, 5.5e-3 with it).
    """

    def __init__(self) -> None:
        self._inputs: list[weakref.ref[Tensor]] = []
        self._constants: tuple[Any, ...] = ()
        self._halves: Halves | None = None

    def of(self, module: nn.Module, scheme: Scheme, constants: Mapping[str, Tensor], arrived: Arrived) -> Halves:
        form = scheme.activations
        inputs = [x for pair in arrived for x in pair[:2]]
        values = (form, *(constant.tolist() for constant in constants.values()))
        same = len(inputs) == len(self._inputs) and all(x is ref() for x, ref in zip(inputs, self._inputs, strict=True))
        if same and values == self._constants and isinstance(module, nn.Linear) and self._halves is not None:
            return self._halves
        self._halves = None
        halves = InputMoments(module), InputMoments(module)
        seen = 0
        for x, original, mask in arrived:
            held = x if form is None else held_input(module, x, form, **constants)
            for number, half in enumerate(halves):
                part = slice((number - seen) % 2, None, 2)
                chosen: Any = part
                if mask is not None and held.dim() == 3 and mask.shape == held.shape[:2]:
                    chosen = mask.bool() & (torch.arange(len(x), device=x.device)[:, None] % 2 == part.start)
                if held[chosen].numel():
                    half.add(held[chosen], original[chosen] if form is None else None)
            seen += len(x)
        self._inputs, self._constants, self._halves = [weakref.ref(x) for x in inputs], values, halves
        return halves


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Keys and values of layers that are done would only fill the memory."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before
