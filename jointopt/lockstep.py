"""Many forward passes side by side, halted at one layer after the other: what comes in is seen, the layer changed.

Each batch's pass runs once, in a thread of its own of which one runs at a time, and waits in front of each of the
given layers until all have come there. So a layer's inputs are those from the layers already changed before it,
whatever the model's forward passes look like, and memory holds one block's activations.
"""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import JointoptError

Arrived = list[tuple[Tensor, Tensor, Tensor | None]]
"""A layer's input in each batch's pass, what the original's same layer gets (without an original, the same again), and
the batch's attention mask where it has one."""


class _Cancelled(BaseException):
    """Ends a pass whose neighbour has failed."""


class _Pass:
    """One batch's forward pass, in a thread of its own that runs only within `advance`.

    Attributes:
        at, input: the layer that it stands in front of, and what goes into it; None before, between and after.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]):
        self.mask: Tensor | None = batch.get("attention_mask")
        self.at: str | None = None
        self.input: Tensor | None = None
        self.cancelled = False
        self._error: BaseException | None = None
        self._go, self._halt = threading.Semaphore(0), threading.Semaphore(0)
        run = contextvars.copy_context().run
        self.thread = threading.Thread(target=run, args=(self._work, model, batch), daemon=True)

    def _work(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self._go.acquire()
        try:
            if not self.cancelled:
                with torch.no_grad():
                    model(**batch)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._halt.release()

    def advance(self) -> None:
        """To the next layer, or to the end. What the model raises is raised here."""
        self._go.release()
        self._halt.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, path: str, x: Tensor) -> None:
        """Called by the pass's own thread: stands in front of a layer."""
        self.at, self.input = path, x
        self._halt.release()
        self._go.acquire()
        self.at = self.input = None
        if self.cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        self.cancelled = True
        self._go.release()
        self.thread.join()


def in_step(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    layers: Collection[str],
    change: Callable[[str, nn.Module, Arrived], None],
    original: nn.Module | None = None,
) -> None:
    """Runs `model` on every batch once, and calls `change` when a layer is first reached.

    Args:
        layers: paths of modules that are called with one tensor. Each call is halted until the layer was changed.
        change: called once with each layer that is reached, in the order of the forward pass: its path, the module
            (to be changed in place, its class too), and its inputs. Without gradients.
        original: a model of the same structure that stays as it is and runs beside it.
    """
    models = [model] if original is None else [model, original]
    passes = [_Pass(owner, batch) for owner in models for batch in batches]
    pairs = list(zip(passes[: len(batches)], passes[-len(batches) :], strict=True))
    by_thread = {each.thread: each for each in passes}
    waiting = set(layers)

    def halted(path: str, module: nn.Module) -> Callable:
        def forward(x: Tensor) -> Tensor:
            if path in waiting:
                by_thread[threading.current_thread()].wait(path, x)
            return type(module).forward(module, x)

        return forward

    for owner, path in itertools.product(models, layers):
        module = owner.get_submodule(path)
        module.__dict__["forward"] = halted(path, module)
    try:
        for each in passes:
            each.thread.start()
            each.advance()
        while standing := [each for each in passes if each.at is not None]:
            reached = standing[0].at
            assert reached is not None
            here = [pair for pair in pairs if pair[0].at == reached]
            if any(beside.at != reached for _, beside in here):
                raise JointoptError(f"{reached}: a batch reaches it in the sub-network, and not in the original")
            with torch.no_grad():
                change(reached, model.get_submodule(reached), [(a.input, b.input, a.mask) for a, b in here])  # type: ignore[misc]
            waiting.discard(reached)
            for each in standing:
                if each.at == reached:
                    each.advance()
    finally:
        for each in passes:
            if each.thread.ident is not None:
                each.cancel()
        for owner, path in itertools.product(models, layers):
            owner.get_submodule(path).__dict__.pop("forward", None)
