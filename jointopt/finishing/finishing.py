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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from jointopt.evaluation.evaluation import Quality, check_supernet, measured
from jointopt.finishing.rounding import ROUNDINGS, rounded_anew
from jointopt.names import FINISHING_RATE
from jointopt.objectives import COSTS
from jointopt.study.choice import front_of, improves, keeping_to
from jointopt.training.alone import train_alone
from jointopt.training.loop import Batches
from quant.errors import JointoptError, check_above_0, check_choice, check_count, check_whole

if TYPE_CHECKING:
    from jointopt.study.study import Study
    from jointopt.supernet.supernet import Supernet


@dataclass(frozen=True)
class Finishing:
    """How sub-networks are finished.

    Attributes:
        rounding: a name of `ROUNDINGS`: "gptq"; or "descent" or "learned", which go on from it, the one column by
            column, the other block by block.
        steps: of training in place of such a rounding, None for none.
        learning_rate, seed: of the training.
        learned_ranges: whether ranges of weights' scales and static inputs are trained too (LSQ, arXiv 1902.08153).
        data: of the training, what tells its batches from others, for a study that records what came of it.
    """

    rounding: str = "gptq"
    steps: int | None = None
    learning_rate: float = FINISHING_RATE
    seed: int = 0
    learned_ranges: bool = False
    data: str = ""

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, ROUNDINGS)
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

    @staticmethod
    def training(name: str) -> tuple[int, bool]:
        """Steps, and whether ranges were trained too, of the training that has this `name`."""
        kind, steps, _ = name.split("-")
        return int(steps), kind == "learned"


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
    rounding: str | None = None,
    quality: Quality | None = None,
    *,
    steps: int | None = None,
    learning_rate: float = FINISHING_RATE,
    seed: int = 0,
    learned_ranges: bool = False,
) -> Finished:
    """Gives one sub-network its last weights: rounded by the expensive method, or trained.

    Rounding runs every batch's forward pass side by side in the sub-network and in its unquantized self: layers
    whose inputs are not rounded are fitted to the outputs there (from two samples on) before they are rounded. Memory
    is that of the sub-network, one block's activations of both for all batches, and one layer's Hessians, of both
    halves of the samples. Layers that are not quantized, embeddings, and layers that share their weight stay as the
    search scored them. Where a layer has a bias, it takes up the mean of the layer's error. Training is of all of the
    sub-network's weights, on the divergence of its logits from the whole model's, in its number formats
    (`training.alone`).

    Args:
        supernet: calibrated. It stays as it is.
        batches: dicts of what the model's forward takes, such as those it was calibrated with, in a list or whatever
            gives them once; "labels" are left out, and padding (where the attention mask is 0) does not count. To
            train: a list of many, or a function from the epoch's number to an iterable of them.
        rounding: "gptq" (default); "descent", which goes on from it column by column and takes about three times as
            long; or "learned", which goes on from it block by block by 200 steps towards the block's outputs, each of
            one batch, and keeps what holds on every eighth batch (of fewer the last), of which it does not learn. It
            takes the longest, and is worth most where inputs are in 4 bits. Memory is then also that of training one
            block.
        quality: scores the finished sub-network: `Finished.metrics`.
        steps: of training, in place of the rounding; with `learning_rate` (AdamW's, 10% warm-up, then a cosine) and
            `seed` (of the order of batches).
        learned_ranges: of that training: whether ranges of weights' scales and static inputs are trained too (LSQ,
            arXiv 1902.08153).

    Raises:
        JointoptError: an unknown rounding, or one beside steps, no batch, a layer that no batch reaches, a Hessian that
            cannot be used, weights that were trained since the calibration that it needs; with the layer's name.
    """
    if rounding is not None and steps is not None:
        raise JointoptError(f"finish: found rounding {rounding!r} and steps {steps}; allowed: one of them")
    how = Finishing(rounding or "gptq", steps, learning_rate, seed, learned_ranges)
    return finish_by(how, supernet, genome, batches, quality)


@torch.inference_mode(False)  # what comes of it may be trained
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
    check_supernet("finish", supernet)
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
        model = rounded_anew(supernet, plan, batches, how.rounding)
    seconds = time.perf_counter() - started
    metrics = None
    if quality is not None:
        costs = {name: float(value) for name, value in supernet.costs(genome).items()}
        metrics = {**costs, **measured(quality, model)}
    return Finished(genome, how.name, model, metrics, seconds)


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
    """Finishes the point of the front that `wanted` chooses and its nearest neighbours, and chooses again, until what
    is chosen is finished: a knee moves with what lies around it.

    What the study has of an earlier call is not scored again.

    Args:
        wanted: keywords of `Study.best`.
        tell: called with a line for each sub-network that was finished.

    Returns:
        The chosen genome, and what finishing made of it; None where it is no better than rounding to nearest.
    """
    kept: Finished | None = None
    waiting = _nearest_on_front(study, study.best(**wanted), top)
    while waiting:
        made = finish_recorded(supernet, study, waiting.pop(0), batches, quality, how)
        chosen = study.best(**wanted, finished=how.name)
        if made is not None:
            tell(_told(study, made))
            if np.array_equal(made.genome, chosen):
                kept = made
        if not waiting and study.finished_metrics(chosen, how.name) is None:
            waiting.append(chosen)
    return chosen, better_finished(supernet, study, chosen, batches, how, kept)


def finish_recorded(
    supernet: Supernet,
    study: Study,
    genome: np.ndarray,
    batches: Batches,
    quality: Quality,
    how: Finishing,
) -> Finished | None:
    """Finishes and scores a genome, and records it; None where the study has it already."""
    if study.finished_metrics(genome, how.name) is not None:
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
    kept: Finished | None,
) -> Finished | None:
    """What finishing makes of a genome, with the metrics that the study has of it; None where its quality is no better
    than that of its evaluation, or the study has none. `kept` is one that need not be made again."""
    record, evaluated = study.finished_metrics(genome, how.name), study.results(genome[None])[0]
    if record is None or not evaluated or not improves(record, evaluated, study.measured or study.objectives[:1]):
        return None
    if kept is not None and np.array_equal(kept.genome, genome):
        return kept
    return replace(finish_by(how, supernet, genome, batches), metrics=record)


def _told(study: Study, made: Finished) -> str:
    name = study.quality.name
    before = (study.results(made.genome[None])[0] or {}).get(name, float("nan"))
    after = (made.metrics or {}).get(name, float("nan"))
    return f"finished ({made.rounding}, {made.seconds:.0f} s): {name} {before:.4g} -> {after:.4g}"


def _nearest_on_front(study: Study, genome: np.ndarray, top: int) -> list[np.ndarray]:
    """The genome and its `top` - 1 neighbours on the front of those that keep to the study's constraints, from small to
    large; of two as near, the smaller first. The genome itself need not be on it: a wish for what is no objective."""
    frame = keeping_to(study.succeeded(), study.constraints)
    near = pd.concat([front_of(frame, study.objectives), frame[frame["genome"] == tuple(genome)]])
    costs = [o.name for o in study.objectives if o.name in COSTS]
    near = near.drop_duplicates("genome").sort_values(costs[0] if costs else study.quality.name, kind="stable")
    at = near["genome"].tolist().index(tuple(genome))
    nearest = sorted(range(len(near)), key=lambda index: abs(index - at))[:top]
    return [np.array(near["genome"].iloc[index], dtype=np.int64) for index in nearest]
