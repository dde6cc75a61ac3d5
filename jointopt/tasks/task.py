"""What a task is: how a source becomes samples, which of the model's logits count, and the names of its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.evaluation import Batch, Quality
from jointopt.rows import DataSource
from jointopt.tasks.metrics import Targets, quality_function


@dataclass(frozen=True)
class Samples:
    """Samples that are ready to be put into batches.

    Attributes:
        count: how many.
        collate: indices -> a batch of the model's inputs and "labels", on the CPU.
        order: the order in which they are evaluated; texts of like length together, so that little is padded.
        device: where the batches go.
    """

    count: int
    collate: Callable[[Sequence[int]], Mapping[str, Tensor]]
    order: Sequence[int]
    device: torch.device

    def batches(self, size: int) -> list[Batch]:
        """All samples once, in their order, kept on the device."""
        return [self._batch(self.order[at : at + size]) for at in range(0, self.count, size)]

    def epoch(self, number: int, size: int, seed: int) -> Iterable[Batch]:
        """All samples once, in an order of the epoch's own, made one batch at a time. A last batch that is not full
        is left out, unless it is the only one."""
        order = np.random.default_rng([seed, number]).permutation(self.count).tolist()
        for at in range(0, max(self.count - size + 1, 1), size):
            yield self._batch(order[at : at + size])

    def _batch(self, indices: Sequence[int]) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in self.collate(indices).items()}


@dataclass(frozen=True)
class Task:
    """A task by name.

    Attributes:
        auto_class: the transformers class that loads a model for it.
        metrics: what its quality function returns; the first is the default objective.
        batch_size: samples in one forward pass of an evaluation, where a config does not say.
        calibration: samples to calibrate with, where a config does not say.
        samples: (source, processor, model) -> samples.
        targets: what of the labels each row of logits should say.
    """

    name: str
    auto_class: str
    metrics: tuple[str, ...]
    batch_size: int
    calibration: int
    samples: Callable[[DataSource, Any, nn.Module], Samples]
    targets: Targets

    def batches(self, source: DataSource, processor: Any, model: nn.Module, batch_size: int) -> list[Batch]:
        """All of a source's samples as batches with "labels", where the model is.

        Raises:
            JointoptError: a source that cannot be read, lacks a column, or whose labels do not fit the model.
        """
        return self.samples(source, processor, model).batches(batch_size)

    def quality(self, batches: Sequence[Batch], original: nn.Module | None = None) -> Quality:
        """model -> its metrics on the batches; "kl" is there where the original is, whose outputs are kept."""
        return quality_function(batches, self.targets, self.metrics, original)


def place_of(model: nn.Module) -> torch.device:
    """The device that a model is on."""
    return next(model.parameters()).device
