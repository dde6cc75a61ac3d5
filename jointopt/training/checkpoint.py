"""What a training is gone on with from where it was killed: one file, of the very same training alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jointopt.files import check_path, reading, write_tensors, writing
from jointopt.study.differences import as_json
from jointopt.supernet.adapters import adapted
from jointopt.supernet.state import distinct_tensors, read_tensors
from jointopt.training.distillation import NUMBERS
from quant.errors import JointoptError, check_kind

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet
    from jointopt.training.recipe import Recipe


class Checkpoint:
    """One file with weights, the optimizer's moments, torch's random state, and the losses so far.

    Args:
        path: it need not be there yet.
        described: what the training's own settings are.
        config: what else its result depends on, by other keys.

    Raises:
        JointoptError: no path, a folder, one in no folder, a key of `config` that is described already.
    """

    def __init__(self, path: Any, described: Mapping[str, Any], config: Mapping[str, Any] | None):
        check_kind("train: checkpoint", path, (str, Path), "a path")
        check_path(path, "train: checkpoint")
        if Path(path).is_dir():
            raise JointoptError(f"train: checkpoint: {str(path)!r} is a folder; allowed: a file")
        if not Path(path).parent.is_dir():
            raise JointoptError(f"train: the checkpoint's folder {str(Path(path).parent)!r} does not exist")
        if known := set(config or {}) & set(described):
            raise JointoptError(f"config: found {min(known)!r}, which every checkpoint records; allowed: another key")
        self.path, self._described = Path(path), {**described, **as_json("config", config or {})}

    def write(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: Sequence[float]) -> None:
        """A reader never sees half of it."""
        tensors = {f"model.{name}": each.detach() for name, each in distinct_tensors(model).items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["random"] = torch.get_rng_state()
        if (device := next(model.parameters()).device).type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(device)
        record = {"described": self._described, "history": list(history)}
        whole = {name: each.cpu().contiguous() for name, each in tensors.items()}
        with writing(f"train: the checkpoint {str(self.path)!r}"):
            write_tensors(self.path, whole, {"training": json.dumps(record)})

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
            if "random.cuda" in tensors and (device := next(model.parameters()).device).type == "cuda":
                torch.cuda.set_rng_state(tensors["random.cuda"], device)
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


def described_by(supernet: Supernet, recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint must have been written with to be gone on from, as far as JSON can hold it."""
    described = {
        "space": supernet.space.to_dict(),
        "the recipe's seed": recipe.seed,
        "sampling": _held_by(recipe.strategy),
        "precision_from": recipe.precision_from,
        "distillation": recipe.distillation and [getattr(recipe.distillation, name) for name in NUMBERS],
        "lora": {path: layer.lora_scale for path, layer in adapted(supernet.model).items()},
        "trained": sorted(
            f"{name} {list(each.shape)}" for name, each in supernet.model.named_parameters() if each.requires_grad
        ),
    }
    return as_json("train", described)


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
            found[name] = as_json(name, value)
    return found


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
