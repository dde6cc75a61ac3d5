"""Genome -> metrics, by the user's function on the active sub-network. A failure is a result too."""

from __future__ import annotations

import math
import numbers
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.arithmetic import full_float32
from jointopt.objectives import COSTS, is_column
from quant.errors import JointoptError, named_line

if TYPE_CHECKING:
    from jointopt.supernet.subnetwork import Plan
    from jointopt.supernet.supernet import Supernet

Quality = Callable[[nn.Module], Any]
"""Model -> a number ("quality", higher is better), or a mapping of metrics to numbers, `Metrics` among them."""


def check_supernet(name: str, found: object) -> None:
    """Raises JointoptError for a model in place of a super-network, or whatever else."""
    if isinstance(found, nn.Module) or not hasattr(found, "space"):
        raise JointoptError(f"{name}: found a {type(found).__name__}; allowed: a Supernet, made of a model and a space")


class Metrics(dict[str, float]):
    """Metrics by name, and the standard errors of those that are means over samples.

    Attributes:
        errors: name -> standard error; how far the value would move if other samples of the kind were drawn.
    """

    def __init__(self, values: Mapping[str, float], errors: Mapping[str, float] | None = None):
        super().__init__(values)
        self.errors = dict(errors or {})


class ChangedWeights(JointoptError):
    """The user's function wrote to weights in place."""


class LostDevice(JointoptError):
    """A GPU that this process can no longer use: an assertion in a kernel, or an access outside of its memory."""


@dataclass(frozen=True)
class Evaluation:
    """What came of one genome: metrics and costs, or the reason why not.

    Attributes:
        errors: metric -> standard error, of those that have one.
    """

    metrics: dict[str, float] | None
    failed: str | None
    seconds: float
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def lacked_memory(self) -> bool:
        """Whether it failed because there was none left."""
        return (self.failed or "").startswith(("OutOfMemoryError", "MemoryError"))


def measured(quality: Quality, model: nn.Module) -> Metrics:
    """The user's function as metrics by name, without gradients, in full float32; those that it computes for itself go
    with it.

    Raises:
        JointoptError: it returned something else than finite numbers, or one by the name of a cost, or an error that
            is negative or of no metric.
        ChangedWeights: it wrote to the model's weights, whatever it returned or raised.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    before = [(name, tensor, state_of(tensor), tensor.detach()) for name, tensor in tensors]
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _, _ in gradients:
        parameter.grad = None
    try:
        with torch.no_grad(), full_float32():
            found = quality(model)
    finally:
        changed = [name for name, tensor, state, _ in before if state_of(tensor) != state]
        for _, tensor, state, held in before:
            if state_of(tensor)[:2] != state[:2]:  # moved, as by model.half(): whose model it is goes on with its own
                tensor.data = held
        for parameter, gradient, trained in gradients:
            parameter.grad = gradient
            if parameter.requires_grad != trained:  # evaluation code likes to freeze what it is given
                parameter.requires_grad_(trained)
        if changed:
            raise ChangedWeights(
                f"quality changed weights that sub-networks share: {', '.join(changed[:3])}"
                f"{' and others' if changed[3:] else ''}; allowed: to leave them as and where they are, or "
                "to change a copy.deepcopy"
            )
    metrics = _numbers(found if isinstance(found, Mapping) else {"quality": found})
    errors = _numbers(given) if (given := getattr(found, "errors", None)) else {}
    for name, value in errors.items():
        if name not in metrics or value < 0:
            raise JointoptError(f"quality returned an error of {value} for {name!r}; allowed: from 0, of its metrics")
    return Metrics(metrics, errors)


def state_of(tensor: Tensor) -> tuple:
    """What is another one after a tensor was written to, or got other data; the inference mode's count no writes."""
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    metrics = dict(found)
    if not metrics:
        raise JointoptError("quality returned no metric; allowed: one or more")
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise JointoptError(f"quality returned {name!r} as the name of a metric; allowed: text")
        if name in COSTS:
            raise JointoptError(f"quality returned {name!r}, which is a cost; allowed: metrics of any other name")
        if is_column(name):
            raise JointoptError(f"quality returned {name!r}, a column that every study has; allowed: another name")
        if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise JointoptError(f"quality returned {type(value).__name__} for {name!r}; allowed: a number")
        try:
            metrics[name] = float(value)
        except OverflowError:
            raise JointoptError(f"quality returned a number beyond all floats for {name!r}; allowed: less") from None
        if not math.isfinite(metrics[name]):
            raise JointoptError(f"quality returned {value} for {name!r}; allowed: a finite number")
    return metrics


def evaluate(supernet: Supernet, genome: np.ndarray, quality: Quality, plan: Plan | None = None) -> Evaluation:
    """One real measurement. What the user's function raises, sys.exit too, is recorded; Ctrl-C goes through, as does
    sys.exit of a signal handler, where the process was asked to end.

    Args:
        plan: the genome's, where it is known already.

    Raises:
        ChangedWeights: the function wrote to the weights, which others share, so that nothing after it would be true.
        LostDevice: the GPU gives errors until the process ends, so that all that came after would fail.
    """
    started = time.perf_counter()
    try:
        metrics = measured(quality, supernet.view(plan or supernet.plan(genome)))
    except ChangedWeights:
        raise
    except torch.AcceleratorError as error:
        raise LostDevice(
            f"quality: {named_line(error)}; allowed: what leaves the device usable. The same call in a new process "
            "goes on; with CUDA_LAUNCH_BLOCKING=1 it tells where this happens"
        ) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and _in_signal_handler(error):
            raise
        return Evaluation(None, named_line(error), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    costs = {name: float(value) for name, value in supernet.costs(genome).items()}
    return Evaluation({**costs, **metrics}, None, seconds, metrics.errors)


def _in_signal_handler(error: BaseException) -> bool:
    handlers = {getattr(signal.getsignal(each), "__code__", None) for each in signal.valid_signals()}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))
