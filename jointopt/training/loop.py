"""A training loop for those who have none: AdamW, a warm-up and a cosine, gone on with where it was killed."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from jointopt.adapters import adapted
from jointopt.batches import Batch, without_labels
from jointopt.files import check_path, reading
from jointopt.learned_ranges import learn, settle
from jointopt.names import TRAINING_RATE
from jointopt.study.differences import plain
from jointopt.supernet.state import distinct_tensors, read_tensors
from jointopt.training.distillation import NUMBERS
from jointopt.training.elastic import gradients_of, processes
from jointopt.training.lora import attach, merge
from jointopt.training.recipe import NONE_COUNTED, Recipe, checked
from quant.errors import JointoptError, check_above_0, check_count, check_kind, check_number, check_whole

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
            function from the epoch's number to an iterable of them, the same each time it is asked.
        steps: number of optimizer steps (AdamW; 10% linear warm-up, then a cosine to zero).
        recipe: what each step trains (default: the sandwich rule, distilled from the largest).
        learning_rate, weight_decay: AdamW's.
        seed: of the order of batches and of dropout; of the sub-networks sampled it is the recipe's.
        sort_every: steps after which channels and heads are sorted again, by their importance on the batch at hand.
        lora: a `peft.LoraConfig`: adapters of its layers alone are trained, and merged at the end (`training.lora`).
        checkpoint: a file from which the same call goes on where an earlier one was killed, with the same result to
            the bit; written every 50 steps, removed at the end. None keeps none.
        config: what else the result depends on (model, data), as JSON can hold it; compared when a checkpoint is gone
            on with.

    Returns:
        The largest sub-network's loss at each step. It warns where none of the labels counted.

    Raises:
        JointoptError: the super-network is not calibrated, no batch came, labels are missing, a loss is not finite, a
            checkpoint of another training, a config that JSON cannot hold, several processes of torch.distributed.
            Like an interrupt, it leaves what was trained so far.
    """
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
        check_kind("train: checkpoint", checkpoint, (str, Path), "a path")
        check_path(checkpoint, "train: checkpoint")
        if Path(checkpoint).is_dir():
            raise JointoptError(f"train: checkpoint: {str(checkpoint)!r} is a folder; allowed: a file")
        rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "sort_every": sort_every}
        if not Path(checkpoint).parent.is_dir():
            raise JointoptError(f"train: the checkpoint's folder {str(Path(checkpoint).parent)!r} does not exist")
        described = {"steps": steps, "seed": seed, **rates, **_described(supernet, recipe)}
        if known := set(config or {}) & set(described):
            raise JointoptError(f"config: found {min(known)!r}, which every checkpoint records; allowed: another key")
        kept = _Checkpoint(Path(checkpoint), {**described, **plain("config", config or {})})
    history: list[float] = []
    with _ending(supernet, optimizer), _seeded(supernet, seed):
        if kept is not None:
            history = kept.restore(model, optimizer)
        counted = bool(history)  # what came before is not known
        numbered = zip(range(len(history), steps), endless(batches, seed, len(history)), strict=False)
        for step, batch in track(
            numbered, "super-network training", total=steps, completed=len(history), disable=not progress
        ):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, steps)
            losses, gradients, _ = gradients_of(supernet, batch, step, step / steps, recipe)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = _hooked(parameter, gradient)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            torch.clear_autocast_cache()  # in which an autocast around all steps keeps the weights of the first
            history.append(losses[0].item())
            counted = counted or recipe.counts(batch["labels"])
            if sort_every is not None and (step + 1) % sort_every == 0:
                supernet.sort_again([without_labels(batch)], optimizer)
            if kept is not None and (step + 1) % EVERY == 0:
                kept.write(model, optimizer, history)
    if kept is not None:
        kept.path.unlink(missing_ok=True)
    if not counted:
        warnings.warn(NONE_COUNTED, stacklevel=2)
    return history


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
    if not (callable(batches) or listed):
        raise JointoptError(
            f"{name}: found batches in a {type(batches).__name__}; allowed: a list, which every epoch goes through in "
            "an order of its own, or a function from an epoch's number to its batches"
        )


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


def endless(batches: Batches, seed: int, done: int) -> Iterator[Batch]:
    """Epoch after epoch, without the first `done` batches."""
    epoch = passed = 0
    while True:
        if callable(batches):
            chosen: Iterable[Batch] = batches(epoch)
        else:
            order = np.random.default_rng([seed, epoch]).permutation(len(batches))
            chosen = (batches[index] for index in order)
        before = passed
        for batch in chosen:
            passed += 1
            if passed > done:
                yield batch
        if passed == before:
            raise JointoptError("train: found no batch")
        epoch += 1


def _described(supernet: Supernet, recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint must have been written with to be gone on from, as far as JSON can hold it."""
    described = {
        "space": supernet.space.to_dict(),
        "the recipe's seed": recipe.seed,
        "sampling": _held_by(recipe.sampling),
        "precision_from": recipe.precision_from,
        "distillation": recipe.distillation and [getattr(recipe.distillation, name) for name in NUMBERS],
        "lora": {path: layer.lora_scale for path, layer in adapted(supernet.model).items()},
        "trained": sorted(
            f"{name} {list(each.shape)}" for name, each in supernet.model.named_parameters() if each.requires_grad
        ),
    }
    return plain("train", described)


def _held_by(sampling: Any) -> dict[str, Any]:
    """The kind of a sampling strategy, and its numbers and texts, those in sets and dataclasses too: functions and
    other objects that it holds cannot be compared with those of another process."""
    found: dict[str, Any] = {"kind": type(sampling).__name__}
    for name, value in getattr(sampling, "__dict__", {}).items():
        if isinstance(value, Tensor):
            value = value.tolist()
        elif isinstance(value, set | frozenset):
            value = sorted(value, key=repr)
        elif is_dataclass(value) and not isinstance(value, type):
            value = {each.name: getattr(value, each.name) for each in fields(value)}
        with suppress(JointoptError):
            found[name] = plain(name, value)
    return found


class _Checkpoint:
    """One file with weights, the optimizer's moments, torch's random state, and the losses so far."""

    def __init__(self, path: Path, described: Mapping[str, Any]):
        self.path, self._described = path, described

    def write(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: Sequence[float]) -> None:
        """Beside, then into place: a reader never sees half of it."""
        tensors = {f"model.{name}": each.detach() for name, each in distinct_tensors(model).items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        record = {"described": self._described, "history": list(history)}
        beside = self.path.with_name(f".{self.path.name}")
        try:
            whole = {name: each.cpu().contiguous() for name, each in tensors.items()}
            save_file(whole, str(beside), metadata={"training": json.dumps(record)})
            os.replace(beside, self.path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise JointoptError(f"train: the checkpoint {str(self.path)!r} cannot be written: {error}") from None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """Puts back what was written, if anything; returns the losses so far."""
        if not self.path.is_file():
            return []
        damaged = partial(reading, f"train: the checkpoint {str(self.path)!r}", "remove it, and train anew")
        with damaged():
            record, tensors = read_tensors(self.path, "training")
            described = (record or {}).get("described", {})
            differing = [key for key, value in self._described.items() if described.get(key) != value]
            if differing:
                raise JointoptError(
                    f"train: {str(self.path)!r} was written by another training, with another {differing[0]}; "
                    "allowed: the same, or remove the file"
                )
            history = [float(loss) for loss in record["history"]]
            _check_shapes(tensors, model, optimizer)
        with damaged(RuntimeError):  # of these alone: elsewhere it is a lack of memory
            torch.set_rng_state(tensors["random"])  # which `_seeded` takes back where it is refused
            if "random.cuda" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["random.cuda"])
        with torch.no_grad():
            for name, own in distinct_tensors(model).items():
                own.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensors[name]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return history


def _check_shapes(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where what is to be put back is missing, or is of another shape than what it is put into."""
    wanted = {f"model.{name}": each.shape for name, each in distinct_tensors(model).items()}
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    for name, each in tensors.items():
        if name.startswith("optimizer.") and each.dim():
            wanted[name] = trained[int(name.split(".")[1])].shape
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            raise ValueError(f"{name} is missing, or of another shape than {list(shape)}")
