"""A training loop for those who have none: AdamW, a warm-up and a cosine, gone on with where it was killed."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from jointopt.batches import Batch, without_labels
from jointopt.names import TRAINING_RATE
from jointopt.supernet.adapters import adapted
from jointopt.supernet.range_factors import learn, settle
from jointopt.training.checkpoint import Checkpoint, described_by
from jointopt.training.elastic import gradients_of, processes
from jointopt.training.lora import attach, merge
from jointopt.training.recipe import NONE_COUNTED, Recipe, checked
from quant.errors import JointoptError, check_above_0, check_count, check_number, check_whole

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

Batches = Sequence[Batch] | Callable[[int], Iterable[Batch]]
EVERY = 50
"""Steps between two checkpoints."""


def train_supernet(
    supernet: Supernet,
    batches: Batches,
    steps: int,
    *,
    recipe: Recipe | None = None,
    learning_rate: float = TRAINING_RATE,
    weight_decay: float = 0.01,
    seed: int = 0,
    sort_every: int | None = None,
    lora: Any = None,
    checkpoint: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[float]:
    """Trains a calibrated super-network in place. Calibrate it again afterwards: its order then stays.

    Args:
        batches: a list of dicts of model inputs and "labels", gone through in a new random order each epoch; or a
            function from the epoch's number to an iterable of them, the same each time it is asked (of a sequence,
            training that goes on does not make again what it has passed).
        steps: number of optimizer steps (AdamW; 10% linear warm-up, then a cosine to zero).
        recipe: what each step trains (default: the sandwich rule, distilled from the largest).
        learning_rate, weight_decay: AdamW's.
        seed: of the order of batches and of dropout; of the sub-networks sampled it is the recipe's.
        sort_every: steps after which channels and heads are sorted again, by their importance on the batch at hand.
        lora: a `peft.LoraConfig`: adapters of its layers alone are trained, and merged at the end (`training.lora`).
        checkpoint: a file from which the same call goes on where an earlier one was killed, with the same result to
            the bit; written every 50 steps and after the last. Remove it when what was trained is saved. None keeps
            none.
        config: what else the result depends on (model, data), as JSON can hold it; compared when a checkpoint is gone
            on with.

    Returns:
        The largest sub-network's loss at each step. It warns where none of the labels counted.

    Raises:
        JointoptError: the super-network is not calibrated, no batch came, labels are missing, a loss is not finite, a
            checkpoint of another training, a config that JSON cannot hold, several processes of torch.distributed.
            Like an interrupt, it leaves what was trained so far.
    """
    _check_settings(batches, steps, sort_every, learning_rate, weight_decay, seed)
    recipe = checked(recipe) or Recipe(seed=seed)
    recipe.check(supernet)
    if lora is not None:
        if sort_every is not None:
            raise JointoptError("sort_every: adapters are not sorted; allowed: without lora")
        with _seeded(supernet, seed):
            attach(supernet, lora)
    if recipe.learned_ranges:
        learn(supernet)
    model = supernet.model
    parameters = [each for each in model.parameters() if each.requires_grad]
    if not parameters:
        raise JointoptError("train: no parameter of the model needs a gradient; allowed: one or more")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    kept = None
    if checkpoint is not None:
        rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "sort_every": sort_every}
        described = {"steps": steps, "seed": seed, **rates, **described_by(supernet, recipe)}
        kept = Checkpoint(checkpoint, described, config)
    history: list[float] = []
    with _ending(supernet, optimizer), _seeded(supernet, seed):
        if kept is not None:
            history = kept.restore(model, optimizer)
        counted = bool(history)  # what came before is not known
        numbered = zip(range(len(history), steps), endless("train", batches, seed, len(history)), strict=False)
        for step, batch in track(
            numbered, "super-network training", total=steps, completed=len(history), disable=not progress
        ):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, steps)
            losses, sums = gradients_of(supernet, batch, step, step / steps, recipe)
            _step(optimizer, parameters, sums.gradients)
            history.append(losses[0].item())
            counted = counted or recipe.counts(batch["labels"])
            if sort_every is not None and (step + 1) % sort_every == 0:
                supernet.sort_again([without_labels(batch)], optimizer)
            if kept is not None and ((step + 1) % EVERY == 0 or step + 1 == steps):
                kept.write(model, optimizer, history)
    if not counted:
        warnings.warn(NONE_COUNTED, stacklevel=2)
    return history


def _check_settings(
    batches: Any, steps: Any, sort_every: Any, learning_rate: Any, weight_decay: Any, seed: Any
) -> None:
    if processes() > 1:
        raise JointoptError(
            f"train: found {processes()} processes of torch.distributed, which would each train weights of their own; "
            "allowed: one, or elastic_loss or ElasticTrainer in their place"
        )
    check_batches("train", batches)
    check_count("train: steps", steps)
    check_count("sort_every", sort_every)
    check_above_0("train: learning_rate", learning_rate)
    check_number("train: weight_decay", weight_decay)
    check_whole("train: seed", seed)


def _step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = _hooked(parameter, gradient)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    torch.clear_autocast_cache()  # in which an autocast around all steps keeps the weights of the first


def _hooked(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor | None:
    """A gradient as the hooks on its parameter leave it."""
    for hook in (parameter._backward_hooks or {}).values():
        if gradient is not None:
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    return gradient


def check_batches(name: str, batches: Any) -> None:
    """Raises JointoptError for what cannot be gone through again and again."""
    listed = hasattr(batches, "__len__") and hasattr(batches, "__getitem__") and not isinstance(batches, Mapping | str)
    if callable(batches) and not _takes_one(batches):
        raise JointoptError(f"{name}: found batches in a function that takes no epoch; allowed: epoch -> its batches")
    if not (callable(batches) or listed):
        raise JointoptError(
            f"{name}: found batches in a {type(batches).__name__}; allowed: a list, which every epoch goes through in "
            "an order of its own, or a function from an epoch's number to its batches"
        )


def _takes_one(function: Callable) -> bool:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # of what is not written in Python nothing is known
        return True
    return True


@contextmanager
def _seeded(supernet: Supernet, seed: int) -> Iterator[None]:
    """Torch draws from this seed, and afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[supernet.device] if supernet.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _ending(supernet: Supernet, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """However training ends, adapters and ranges become part of what it has trained, so that it can begin again.

    Meanwhile the whole model is in the mode of its views, which then need not be put in it one by one.
    """
    before = supernet.model.training
    supernet.model.train()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # whatever the caller has, as a step without gradients would train nothing
            yield
    finally:
        supernet.model.train(before)
        optimizer.zero_grad(set_to_none=True)
        supernet.weights_changed()
        if adapted(supernet.model):
            merge(supernet)
        settle(supernet)


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: 10% linear warm-up, then a cosine to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def endless(what: str, batches: Batches, seed: int, done: int) -> Iterator[Batch]:
    """Epoch after epoch, without the first `done` batches. `what` is trained, as an error begins."""
    epoch = passed = 0
    while True:
        before = passed
        if callable(batches):
            chosen = batches(epoch)
            order = list(range(len(chosen))) if isinstance(chosen, Sequence) else None
        else:
            chosen = batches
            order = np.random.default_rng([seed, epoch]).permutation(len(batches)).tolist()
        if order is not None:  # then those that are passed need not be made
            listed = cast("Sequence[Batch]", chosen)
            passed += min(len(order), max(done - passed, 0))
            chosen = (listed[index] for index in order[passed - before :])
        for batch in chosen:
            passed += 1
            if passed > done:
                yield batch
        if passed == before:
            raise JointoptError(f"{what}: found no batch; allowed: one or more dicts of the model's inputs")
        epoch += 1
