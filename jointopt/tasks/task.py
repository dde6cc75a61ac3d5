"""What a task is: three functions and the names of its metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from jointopt.evaluation import Batch, Quality
from jointopt.rows import DataSource


@dataclass(frozen=True)
class Task:
    """A task by name.

    Attributes:
        auto_class: the transformers class that loads a model for it.
        metrics: what its quality function returns.
        batches: (source, processor, model, batch size) -> batches with "labels".
        quality: (batches, original model or None) -> the quality function; "kl" is there where the original is.
    """

    name: str
    auto_class: str
    metrics: tuple[str, ...]
    batches: Callable[[DataSource, Any, nn.Module, int], list[Batch]]
    quality: Callable[[Sequence[Batch], nn.Module | None], Quality]
