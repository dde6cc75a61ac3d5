"""A roofline of this machine, fitted to the times of a few dozen operators in ONNX Runtime.

    roofline = jointopt.fit_roofline(supernet, batch=8)
    roofline = roofline.fit(supernet, genomes, seconds)         # by sub-networks that were timed end to end
    roofline.device.save("mine.yaml")                           # then `hardware: {device: mine.yaml}`

A kind of operator in a scheme has a rate of its own, since what kernels there are decides it and not the format: ONNX
Runtime's dynamic integer convolutions are slower than those of floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import least_squares

from jointopt.cost.device import Device, LastLevelCache, load_device
from jointopt.cost.operators import Operator
from jointopt.cost.roofline import Roofline
from jointopt.timing.backend import ONNXRUNTIME, Backend
from jointopt.timing.lookup import operators_of, times_of
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

FEWEST = 8
"""Operators without which rates, bandwidths and overhead cannot be told apart."""
SHORTEST = 1e-6
"""Seconds below which a time is all noise."""
RATE, BANDWIDTH, CACHE_BANDWIDTH, OVERHEAD = 3e10, 1e10, 5e10, 5e-6
"""Of one core, about: where the fit begins."""
HELD = 0.05
"""Weight of the prior that holds parameters which the timings do not determine near their expected values."""


def fit_roofline(
    supernet: Supernet,
    batch: int = 1,
    context: int | None = None,
    threads: int = 1,
    operators: int = 48,
    path: str | Path | None = None,
    device: str = "cpu-avx2",
) -> Roofline:
    """The roofline that comes closest to the times of some of a super-network's operators on this machine.

    Args:
        batch, context: see `Roofline`.
        threads: of ONNX Runtime.
        operators: how many are timed, kinds and schemes in turn; at least one of each.
        path: the file of timings that `Lookup.of` keeps.
        device: what is not timed is this one's: capacities, power, and rates of kernels that the space has not.

    Raises:
        JointoptError: fewer than 8 operators; what `Lookup.of` and `load_device` raise.
    """
    asked = _in_turns(operators_of(supernet, batch, context), operators)
    if len(asked) < FEWEST:
        raise JointoptError(f"fit_roofline: found {len(asked)} operators to time; allowed: {FEWEST} or more")
    backend = Backend.of(supernet, ONNXRUNTIME, threads)
    seconds = times_of(asked, batch, backend, path)
    kernels = sorted({each.kernel for each in asked if each.macs})
    base = load_device(device).model_copy(update={"name": f"{backend.machine}, fitted to {len(asked)} operators"})
    expected = np.log([*([RATE] * len(kernels)), BANDWIDTH, CACHE_BANDWIDTH, OVERHEAD])

    def off(parameters: np.ndarray) -> np.ndarray:
        model = Roofline(_device(base, kernels, parameters), batch, context)
        found = np.array([model.answer(each).seconds for each in asked])
        return np.concatenate([np.log(found / np.maximum(seconds, SHORTEST)), HELD * (parameters - expected)])

    fitted = least_squares(off, expected, loss="soft_l1")
    return Roofline(_device(base, kernels, fitted.x), batch, context)


def _device(base: Device, kernels: Sequence[str], parameters: np.ndarray) -> Device:
    """With these logarithms of the kernels' rates, of the bandwidths of memory and cache, and of the overhead."""
    *rates, bandwidth, cache, overhead = np.exp(parameters).tolist()
    return base.model_copy(
        update={
            "kernels": dict(zip(kernels, rates, strict=True)),
            "bandwidth": bandwidth,
            "cache": LastLevelCache(capacity=base.cache.capacity, bandwidth=cache),
            "overhead": overhead,
            "efficiency": base.efficiency.model_copy(update={"memory": 1.0}),
        }
    )


def _in_turns(operators: Sequence[Operator], count: int) -> list[Operator]:
    """So many of them, but at least one of each kind in each scheme: its largest, its smallest, then those between."""
    kinds: dict[str, list[Operator]] = {}
    for each in sorted(operators, key=lambda each: each.macs):
        kinds.setdefault(each.kernel, []).append(each)
    queues = [_spread(members) for members in kinds.values()]
    found = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return found[: max(count, len(queues))]


def _spread(members: list[Operator]) -> list[Operator]:
    """Both ends first, then the middles of what is left between."""
    places = [len(members) - 1, 0]
    gaps = [(0, len(members) - 1)]
    for low, high in gaps:
        if high - low > 1:
            places.append((low + high) // 2)
            gaps += [(low, places[-1]), (places[-1], high)]
    return [members[at] for at in dict.fromkeys(places)]
