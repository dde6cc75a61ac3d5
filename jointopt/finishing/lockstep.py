"""Many forward passes side by side, halted at one module after the other: what comes in is seen, the module changed.

Each batch's pass runs once, in a thread of its own of which one runs at a time, and waits in front of each of the
given modules until all have come there. So a module's inputs are those from the modules already changed before it,
whatever the model's forward passes look like, and memory holds one block's activations. What has arrived at a module
is in turn all that passes through it need, so that a block may be gone through layer by layer while it is changed.
"""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.supernet.importance import hidden_input
from quant.errors import JointoptError


@dataclass(frozen=True)
class Call:
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Arrived:
    """One batch, in front of a module.

    Attributes:
        call: of the module.
        original: of the original's same module (without an original, the same again).
        mask: the batch's attention mask, where it has one.
    """

    call: Call
    original: Call
    mask: Tensor | None

    @property
    def x(self) -> Tensor:
        """The input of a layer that takes one tensor."""
        return hidden_input(self.call.args, self.call.kwargs)

    @property
    def original_x(self) -> Tensor:
        return hidden_input(self.original.args, self.original.kwargs)


def starting(batch: Mapping[str, Any]) -> Arrived:
    """A batch of keyword arguments, in front of the whole model."""
    call = Call((), batch)
    return Arrived(call, call, batch.get("attention_mask"))


class _Cancelled(BaseException):
    """Ends a pass whose neighbour has failed."""


class _Pass:
    """One batch's forward pass, in a thread of its own that runs only within `advance`.

    Attributes:
        at, call: the module that it stands in front of, and what goes into it; None before, between and after.
    """

    def __init__(self, model: nn.Module, call: Call):
        self.at: str | None = None
        self.call: Call | None = None
        self.cancelled = False
        self._error: BaseException | None = None
        self._go, self._halt = threading.Semaphore(0), threading.Semaphore(0)
        run = contextvars.copy_context().run
        self.thread = threading.Thread(target=run, args=(self._work, model, call), daemon=True)

    def _work(self, model: nn.Module, call: Call) -> None:
        self._go.acquire()
        try:
            if not self.cancelled:
                with torch.no_grad():
                    model(*call.args, **call.kwargs)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._halt.release()

    def advance(self) -> None:
        """To the next module, or to the end. What the model raises is raised here."""
        self._go.release()
        self._halt.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, path: str, call: Call) -> None:
        """Called by the pass's own thread: stands in front of a module."""
        self.at, self.call = path, call
        self._halt.release()
        self._go.acquire()
        self.at = self.call = None
        if self.cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        self.cancelled = True
        self._go.release()
        self.thread.join()


def in_step(
    model: nn.Module,
    batches: Sequence[Arrived],
    modules: Collection[str],
    change: Callable[[str, nn.Module, list[Arrived]], None],
    original: nn.Module | None = None,
) -> None:
    """Runs `model` on every batch once, and calls `change` when a module is first reached.

    Args:
        modules: their paths, none inside another. Each call is halted until the module was changed.
        change: called once with each module that is reached, in the order of the forward pass: its path, the module
            (to be changed in place, its class too), and what has arrived there. Without gradients.
        original: a model of the same structure that stays as it is and runs beside it.
    """
    calls = [(model, each.call) for each in batches]
    if original is not None:
        calls += [(original, each.original) for each in batches]
    passes = [_Pass(owner, call) for owner, call in calls]
    pairs = list(zip(passes[: len(batches)], passes[-len(batches) :], (each.mask for each in batches), strict=True))
    by_thread = {each.thread: each for each in passes}
    waiting = set(modules)

    def halted(path: str, module: nn.Module) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            standing = by_thread.get(threading.current_thread())  # none where `change` itself calls the module
            if path in waiting and standing is not None:
                standing.wait(path, Call(args, kwargs))
            return type(module).forward(module, *args, **kwargs)

        return forward

    owners = [model] if original is None else [model, original]
    for owner, path in itertools.product(owners, modules):
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
            if any(beside.at != reached for _, beside, _ in here):
                raise JointoptError(f"{reached}: a batch reaches it in the sub-network, and not in the original")
            with torch.no_grad():
                change(reached, model.get_submodule(reached), [Arrived(a.call, b.call, mask) for a, b, mask in here])  # type: ignore[arg-type]
            waiting.discard(reached)
            for each in standing:
                if each.at == reached:
                    each.advance()
    finally:
        for each in passes:
            if each.thread.ident is not None:
                each.cancel()
        for owner, path in itertools.product(owners, modules):
            owner.get_submodule(path).__dict__.pop("forward", None)
