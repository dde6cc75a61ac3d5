"""Genome -> metrics, by the user's function on the active sub-network. A failure is a result too."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.objectives import COSTS
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.supernet import Supernet

Quality = Callable[[nn.Module], Any]
"""Model -> a number ("quality", higher is better), or a mapping of metrics to numbers."""

Batch = Mapping[str, Any]
"""What a model's forward takes, by name; "labels" beside it are for losses and metrics."""


@dataclass(frozen=True)
class Evaluation:
    """What came of one genome: metrics and costs, or the reason why not."""

    metrics: dict[str, float] | None
    failed: str | None
    seconds: float


def measured(quality: Quality, model: nn.Module) -> dict[str, float]:
    """The user's function as metrics by name, without gradients.

    Raises:
        JointoptError: it returned something else than finite numbers, or one by the name of a cost.
    """
    with torch.no_grad():
        found = quality(model)
    metrics = dict(found) if isinstance(found, Mapping) else {"quality": found}
    for name, value in metrics.items():
        if name in COSTS:
            raise JointoptError(f"quality returned {name!r}, which is a cost; allowed: metrics of any other name")
        if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise JointoptError(f"quality returned {type(value).__name__} for {name!r}; allowed: a number")
        if not math.isfinite(value):
            raise JointoptError(f"quality returned {value} for {name!r}; allowed: a finite number")
        metrics[name] = float(value)
    return metrics


def evaluate(supernet: Supernet, genome: np.ndarray, quality: Quality) -> Evaluation:
    """One real measurement. What the user's function raises is recorded, not raised; Ctrl-C goes through."""
    started = time.perf_counter()
    try:
        with supernet.active(genome) as model:
            metrics = measured(quality, model)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        return Evaluation(None, reason, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    costs = {name: float(value) for name, value in supernet.costs(genome).items()}
    return Evaluation({**costs, **metrics}, None, seconds)


def logits_of(model: nn.Module, inputs: Batch) -> Tensor:
    """The logits, whether the model returns a tensor (timm) or an output with `.logits` (transformers)."""
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits
