"""What a task is: how a source becomes samples, and what the outputs of its models can be; and what several tasks read
off a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.batches import Batch, most_tokens
from jointopt.outputs import MULTI_LABEL, REGRESSION, problem_of
from jointopt.rows import Columns, DataSource
from jointopt.tasks.problems import CLASSIFICATION, NEXT_TOKEN, ONE_CLASS, Problem
from quant.errors import JointoptError

LENGTH = 512
"""Tokens of a text, where neither the config, nor the tokenizer, nor the model says fewer."""


@dataclass(frozen=True)
class Samples:
    """Samples that are ready to be put into batches.

    Attributes:
        count: how many.
        collate: indices -> a batch of the model's inputs and, where the source is labelled, "labels"; on the CPU.
        order: the order in which they are evaluated; texts of like length together, so that little is padded.
        device: where the batches go.
        mark: index -> what tells this sample from another in its place; cheap, as it is asked of all.
        read_late: whether a sample is read when it is asked for, so that one that is damaged is found only then.
    """

    count: int
    collate: Callable[[Sequence[int]], Mapping[str, Tensor]]
    order: Sequence[int]
    device: torch.device
    mark: Callable[[int], bytes]
    read_late: bool = False

    def batches(self, size: int) -> list[Batch]:
        """All samples once, in their order, kept on the device."""
        return [self._batch(self.order[at : at + size]) for at in range(0, self.count, size)]

    def epoch(self, number: int, size: int, seed: int) -> Sequence[Batch]:
        """All samples once, in an order of the epoch's own, each batch made when it is asked for. A last batch that is
        not full is left out, unless it is the only one."""
        return _Epoch(self._batch, self.shuffled(number, seed), size)

    def shuffled(self, number: int, seed: int) -> list[int]:
        """The order of an epoch."""
        return np.random.default_rng([seed, number]).permutation(self.count).tolist()

    def _batch(self, indices: Sequence[int]) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in self.collate(indices).items()}


@dataclass(frozen=True)
class _Epoch(Sequence[Batch]):
    make: Callable[[Sequence[int]], Batch]
    order: list[int]
    size: int

    def __len__(self) -> int:
        return max(len(self.order) // self.size, 1)

    def __getitem__(self, at: Any) -> Any:
        start = range(len(self))[at] * self.size
        return self.make(self.order[start : start + self.size])


@dataclass(frozen=True)
class Task:
    """A task by name.

    Attributes:
        auto_class: the transformers class that loads a model for it.
        problems: what its models' outputs can be, by what `problem_of` says of a model; None is all else.
        batch_size: samples in one forward pass of an evaluation, where a config does not say.
        calibration: samples to calibrate with, where a config does not say.
        samples: (source, processor, model) -> samples, with "labels" where the source is labelled, on the model's
            device. Raises JointoptError for a source that cannot be read, lacks a column, or whose labels do not fit
            the model.
    """

    name: str
    auto_class: str
    problems: Mapping[str | None, Problem]
    batch_size: int
    calibration: int
    samples: Callable[[DataSource, Any, nn.Module], Samples]

    def problem(self, model: nn.Module) -> Problem:
        """What the model's outputs are."""
        return self.problems.get(problem_of(model), self.problems[None])

    def check_scored(self, model: nn.Module) -> None:
        """Raises JointoptError for a model that cannot be scored by built-in metrics, which a user's own quality may be
        able to."""
        if self.problem(model) is NEXT_TOKEN and not _causal(model):
            raise JointoptError(
                f"task: found {self.name}, and {type(model).__name__} reads each token before it says which it is; "
                "allowed: models that read earlier ones alone, such as LLaMA's, or quality: my_package.my_function"
            )
        if self.problem(model) is ONE_CLASS and len(label_names(model)) < 2:
            said = (
                f"problem_type {MULTI_LABEL} or {REGRESSION} in its config.json, or "
                if hasattr(model, "config")
                else ""
            )
            raise JointoptError(
                f"model: found a single output, which is no class of several; allowed: {said}quality: "
                "my_package.my_function"
            )


def _causal(model: nn.Module) -> bool:
    """Whether each token is computed from the ones before it alone. Attention layers of transformers say so themselves;
    a LLaMA's config may turn it off (`is_causal: false`), which they do not say."""
    turned_off = not getattr(getattr(model, "config", None), "is_causal", True)
    return not turned_off and all(getattr(module, "is_causal", True) for module in model.modules())


def place_of(model: nn.Module) -> torch.device:
    """The device that a model is on."""
    return next(model.parameters()).device


def read_labels(
    columns: Columns, source: DataSource, model: nn.Module, folders: Sequence[str] | None = None
) -> Tensor | None:
    """The labels of a classifier's samples as its loss takes them; None where the source is not labelled.

    Args:
        folders: of images by class.

    Raises:
        JointoptError: a label that does not fit what the model's outputs are.
    """
    read = CLASSIFICATION[problem_of(model)].labels
    assert read is not None
    return read(columns, source, label_names(model), folders) if source.labelled else None


def picked_labels(labels: Tensor | None, indices: Sequence[int]) -> dict[str, Tensor]:
    """What a batch has of the labels, where there are some."""
    return {} if labels is None else {"labels": labels[list(indices)]}


def text_length(source: DataSource, processor: Any, model: nn.Module) -> int:
    """Tokens in a text at most: what the config says, or as many as the model and its tokenizer take, 512 at most.

    Raises:
        JointoptError: the config says more than the model takes.
    """
    most = most_tokens(model) or LENGTH
    if source.length is not None and source.length > most:
        raise JointoptError(f"data.length: found {source.length}; the model takes {most} tokens at most")
    # What `truncation=True` cuts texts to; 1e30, as transformers has it, where the tokenizer does not say.
    own = getattr(processor, "model_max_length", LENGTH)
    return source.length or int(min(most, own, LENGTH))


def label_names(model: Any) -> list[str]:
    """The names of the model's classes in their order, or their numbers where it has none."""
    config = getattr(model, "config", None)
    if config is not None:
        named = {int(index): str(name) for index, name in config.id2label.items()}
        return [named.get(index, str(index)) for index in range(config.num_labels)]
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    return list(map(str, names if len(names) == model.num_classes else range(model.num_classes)))
