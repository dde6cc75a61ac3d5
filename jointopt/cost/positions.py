"""How often each module of a model is applied to a sample: tokens, pixels, or once for all of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.batches import sample_count
from jointopt.outputs import first_output
from quant.errors import DOES_NOT_RUN
from search_spaces.clones import structural_clone, without_chunks


@dataclass(frozen=True)
class Positions:
    """How often the modules of a model are applied.

    Attributes:
        of: path of a layer or normalization -> number of positions it is applied to (tokens, pixels) for one sample; of
            one that runs once, for all.
        once: paths of those that run once for all samples of a batch, as BERT looks up its positions.
    """

    of: Mapping[str, float]
    once: frozenset[str] = frozenset()


def measure_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Positions:
    """The positions of samples such as those of `inputs`, however many these are. In a model that takes this number of
    samples alone nothing is known to run once."""
    shell = without_chunks(structural_clone(model)).eval()
    count, totals = sample_count(inputs), _applied(shell, inputs)
    try:
        others = _applied(shell, _first(inputs, 1 if count > 1 else 2))
    except DOES_NOT_RUN:
        others = {}
    once = frozenset(path for path, total in totals.items() if total == others.get(path))
    return Positions({path: total if path in once else total / count for path, total in totals.items()}, once)


def _first(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first one or two samples, the only one twice. Tensors that are as long as there are samples are taken to hold
    one entry for each, others stay."""
    given = sample_count(inputs)
    batched = [name for name, each in inputs.items() if isinstance(each, Tensor) and each.dim() and len(each) == given]
    return {**inputs, **{name: torch.cat([inputs[name][:count]] * count)[:count] for name in batched}}


def _applied(shell: nn.Module, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Path -> positions it is applied to, for all samples."""
    positions: dict[str, float] = {}

    def counter(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            made: Tensor = first_output(output)  # a norm may also return the residual that it added
            channels = made.shape[-3 if isinstance(module, nn.Conv2d) else -1]
            positions[path] = positions.get(path, 0.0) + made.numel() / channels

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for path, module in shell.named_modules():
            if kind_of(module) is not None:
                hooks.enter_context(module.register_forward_hook(counter(path)))
        shell(**inputs)
    return positions


def kind_of(module: nn.Module) -> str | None:
    """What operator a module is; None for those that hold others, that take no time of their own, or that are folded
    into a neighbour where a network is deployed (BatchNorm)."""
    for kind, name in ((nn.Linear, "linear"), (nn.Conv2d, "conv"), (nn.Embedding, "embedding")):
        if isinstance(module, kind):
            return name
    return "norm" if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) else None
