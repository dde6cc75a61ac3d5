"""Times single operators and whole models: in ONNX Runtime, each written by the code that writes an export, or in
torch."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.batches import on_device
from jointopt.cost.operators import Operator
from jointopt.evaluation.workers import threads_of_torch
from jointopt.timing.backend import TORCH, Backend
from quant.kernels import quantize
from quant.layers import as_quantized

LEAST, EACH = 1.0, 0.1
"""Seconds for which operators are timed in turns at least, altogether and for each of them: so that those of some
microseconds are timed often, and all outlast what else the machine does for a while."""
WORDS = 1000
"""Rows of the table that an embedding is timed with: those that are looked up count."""


class Attention(nn.Module):
    """Queries [batch, tokens, channels], keys and values -> their products, heads parted and joined again."""

    def __init__(self, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups = heads, groups

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        size = queries.shape[-1] // self.heads
        q = queries.unflatten(-1, (self.heads, size)).transpose(1, 2)
        k, v = (each.unflatten(-1, (self.groups, size)).transpose(1, 2) for each in (keys, values))
        k, v = (each.repeat_interleave(self.heads // self.groups, 1) for each in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def module_of(operator: Operator, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module that does an operator's work, with random weights, and inputs for it."""
    batch, positions = operator.samples(batch), max(1, round(operator.positions))
    rows, columns = operator.rows, operator.columns
    if operator.kind == "attention":
        groups = max(1, operator.heads * columns // rows)
        context = max(1, round(operator.context))
        inputs = (torch.randn(batch, positions, rows), *(torch.randn(batch, context, columns) for _ in range(2)))
        return Attention(operator.heads, groups), inputs
    if operator.kind == "embedding":
        module: nn.Module = nn.Embedding(WORDS, rows)
        inputs = (torch.randint(WORDS, (batch, positions)),)
    elif operator.kind == "norm":
        return nn.LayerNorm(rows), (torch.randn(batch, positions, rows),)
    elif operator.kind == "conv":
        side, kernel = max(1, round(math.sqrt(positions))), round(math.sqrt(operator.area))
        module = nn.Conv2d(columns * operator.heads, rows, kernel, padding=kernel // 2, groups=operator.heads)
        inputs = (torch.randn(batch, columns * operator.heads, side, side),)
    else:
        module, inputs = nn.Linear(columns, rows), (torch.randn(batch, positions, columns),)
    return _quantized(module, operator), inputs


def _quantized(module: Any, operator: Operator) -> nn.Module:
    scheme = operator.scheme
    if scheme is None or scheme.weights is None:
        return module
    codes = quantize(module.weight.detach(), scheme.weights)
    static = torch.tensor([0.05]) if scheme.activations is not None and not scheme.activations.dynamic else None
    centre = None if scheme.activations is None or scheme.activations.symmetric else torch.tensor([-128]).char()
    as_quantized(module, scheme, codes, {"input_scale": static, "input_zero_point": centre})
    return module


class _Rounding(nn.Module):
    """What rounds an output like a convolution's input; tracing has put an ONNX layer in its place by then."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        from jointopt.checkpoint.onnx.layers import integers

        twin: Any = self.convolution
        return integers(x, twin.activations, twin.input_scale, twin.input_zero_point)[0]


class _Fused(_Rounding):
    """A convolution whose output is rounded for its reader: both are one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.relu(self.convolution(x)))


class _Each(nn.Module):
    """Many modules side by side, so that they are traced together."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, inputs: list[list[Tensor]]) -> list[Tensor]:
        return [module(*given) for module, given in zip(self.each, inputs, strict=True)]


def time_operators(operators: Sequence[Operator], batch: int, backend: Backend, rounds: int = 30) -> list[float]:
    """Seconds that each operator takes for a batch: medians of `rounds` or more, without what calling the backend
    costs.

    A fused convolution takes what it and its reader's rounding take, less what that would take by itself: its reader
    is timed from numbers that are not rounded yet.
    """
    modules: list[nn.Module] = []
    inputs: list[tuple[Tensor, ...]] = []
    for operator in operators:
        module, given = module_of(operator, batch)
        modules.append(_Fused(module) if operator.fused else module)
        inputs.append(given)
    spared = [at for at, operator in enumerate(operators) if operator.fused]
    for at in spared:
        modules.append(_Rounding(modules[at].convolution))  # type: ignore[arg-type]
        inputs.append((torch.randn(len(inputs[at][0]), operators[at].rows, *inputs[at][0].shape[2:]),))
    make = _torch_calls if backend.name == TORCH else _sessions
    calls = [*make(modules, inputs, backend), *make((nn.Identity(),), ((torch.zeros(1),),), backend)]
    with _as_deployed(backend):
        medians = in_turns(calls, rounds, max(LEAST, EACH * len(calls)))
    found = [max(each - medians[-1], 0.0) for each in medians[:-1]]
    for at, rounding in zip(spared, found[len(operators) :], strict=True):
        found[at] = max(found[at] - rounding, 0.0)
    return found[: len(operators)]


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int, least: float = 0.0) -> list[float]:
    """Median seconds of each call, after two that do not count; for as many rounds and as many seconds at least."""
    seconds: list[list[float]] = [[] for _ in calls]
    ends = time.monotonic() + least
    while len(seconds[0]) < rounds + 2 or time.monotonic() < ends:
        for call, kept in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            kept.append(time.perf_counter() - started)
    return [float(np.median(kept[2:])) for kept in seconds]


@contextmanager
def _as_deployed(backend: Backend) -> Iterator[None]:
    """No gradients, and as many threads as the backend has."""
    with threads_of_torch(backend.threads), torch.inference_mode():
        yield


def _torch_calls(
    modules: Sequence[nn.Module], inputs: Sequence[Sequence[Tensor]], backend: Backend
) -> list[Callable[[], Any]]:
    """A call for each module, which runs it alone in torch."""

    def moved(each: Tensor) -> Tensor:
        return each.to(backend.device, backend.dtype if each.is_floating_point() else each.dtype)

    return [
        _finished(partial(module.to(backend.device, backend.dtype).eval(), *map(moved, given)), backend)
        for module, given in zip(modules, inputs, strict=True)
    ]


def _finished(call: Callable[[], Any], backend: Backend) -> Callable[[], Any]:
    """The call, and waiting for what it left a GPU to do."""
    device = torch.device(backend.device)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None

    def finished() -> None:
        call()
        if wait is not None:
            wait()

    return finished


def _sessions(
    modules: Sequence[nn.Module], inputs: Sequence[Sequence[Tensor]], backend: Backend
) -> list[Callable[[], Any]]:
    """A call for each module, which runs it alone in ONNX Runtime."""
    import onnx

    from jointopt.checkpoint.onnx.graph import traced, with_twins
    from jointopt.checkpoint.onnx.session import session_of

    graph: Any = with_twins(_Each(modules).eval())
    program = traced(graph, ([list(each) for each in inputs],))
    whole = program.model_proto
    names = iter([each.name for each in whole.graph.input])
    extractor = onnx.utils.Extractor(whole)
    calls: list[Callable[[], Any]] = []
    for given, output in zip(inputs, whole.graph.output, strict=True):
        feed = {next(names): each.numpy() for each in given}
        part = extractor.extract_model(list(feed), [output.name])
        calls.append(partial(session_of(part.SerializeToString(), backend.threads).run, None, feed))
    return calls


def time_export(folder: str | Path, inputs: Mapping[str, Any], backend: Backend, rounds: int = 20) -> float:
    """Median seconds of an exported folder's model for a batch, end to end, as its library loads it."""
    run = run_of_export(folder, inputs, backend)
    with _as_deployed(backend):
        return in_turns([run], rounds, LEAST)[0]


def time_exports(
    folders: Iterable[str | Path], inputs: Mapping[str, Any], backend: Backend, rounds: int = 20, least: float = LEAST
) -> list[float]:
    """`time_export` of each, as if the machine had been as fast for all of them: each is timed in turns with the first,
    for `least` seconds or more.

    Two models are held at a time; a folder may be gone when the next is asked for.
    """
    first, ratios, reference = None, [], []
    for folder in folders:
        run = run_of_export(folder, inputs, backend)
        first = first or run
        with _as_deployed(backend):
            its, one = in_turns([run, first], rounds, least)
        del run  # it is not held while the next is made
        ratios.append(its / one)
        reference.append(one)
    return [each * float(np.median(reference)) for each in ratios]


def run_of_export(folder: str | Path, inputs: Mapping[str, Any], backend: Backend) -> Callable[[], Any]:
    """A call that runs an exported folder's model, as its library loads it, on a batch."""
    if backend.name == TORCH:
        from jointopt.checkpoint.reload import load_model

        with redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars, the last of them at the first run
            model = load_model(str(folder), backend.device).to(backend.device)
            run = _finished(partial(model, **on_device(inputs, torch.device(backend.device))), backend)
            with _as_deployed(backend):
                run()
        return run
    from jointopt.checkpoint.onnx.session import OnnxModel
    from jointopt.checkpoint.onnx.writer import MODEL

    session, given = OnnxModel(Path(folder) / MODEL, backend.threads), on_device(inputs, torch.device("cpu"))
    return partial(session.session.run, None, session.completed({name: each.numpy() for name, each in given.items()}))
