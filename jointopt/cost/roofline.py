"""Latency and energy by roofline: an operator takes as long as its products or its bytes, whichever is longer.

Williams et al., CACM 52(4), 2009; for the prefill and decoding of language models as in GenZ (arXiv 2406.01698): the
weights of an operator are read once for a batch, keys and values once for a sequence, intermediate results stay in the
cache where they fit, and layers that are spread over several devices end in a ring of partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jointopt.cost.device import Device
from jointopt.cost.operators import Answer, Operator, times_to_fit
from jointopt.names import MOST
from quant.errors import JointoptError, check_count

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet


@dataclass(frozen=True)
class Roofline:
    """The roofline of one or several devices.

    Attributes:
        device: see `load_device`.
        batch: samples that are computed together.
        context: tokens of a sample, None for as many as calibration samples have on average.
        parallel: devices over which each layer is spread (tensor parallelism).
        error: mean absolute relative error where it was fitted, end to end; None where it was not.
    """

    device: Device
    batch: int = 1
    context: int | None = None
    parallel: int = 1
    error: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, Device):
            raise JointoptError(f"roofline: found device {self.device!r}; allowed: what load_device returns")
        for name in ("batch", "parallel", "context"):
            check_count(f"roofline: {name}", getattr(self, name), MOST[name])
        if self.parallel > 1 and self.device.network is None:
            raise JointoptError(
                f"roofline: parallel {self.parallel}, and {self.device.name} has no network; allowed: 1"
            )

    @property
    def source(self) -> str:
        several = f"{self.parallel} x " if self.parallel > 1 else ""
        off = "" if self.error is None else f", {self.error:.0%} off where it was fitted end to end"
        return f"roofline of {several}{self.device.name}{off}"

    @property
    def capacity(self) -> float:
        return self.device.capacity * self.parallel

    def described(self) -> dict[str, Any]:
        return {
            "model": "roofline",
            "source": self.source,
            "device": self.device.model_dump(),
            "batch": self.batch,
            "context": self.context,
            "parallel": self.parallel,
        }

    def answer(self, operator: Operator) -> Answer:
        """Seconds: the longer of computing and of moving what the cache does not hold, then what it takes to start and
        to reduce over devices. Joules: at peak power while it computes or moves, at idle power else."""
        device = self.device
        rate = device.kernels.get(operator.kernel)
        if rate is None:
            rate = device.peak[device.computes(operator.scheme, operator.bits)] * device.efficiency.compute
        batch = operator.samples(self.batch)
        operations = 2 * operator.macs * batch / self.parallel
        moved = (operator.input_bytes + operator.output_bytes) * batch / self.parallel
        stored = (operator.weight_bytes + operator.cache_bytes * batch) / self.parallel
        if operator.kind == "embedding":  # only the rows that are looked up are read
            stored = operator.output_bytes * batch / self.parallel
        reach = device.bandwidth * device.efficiency.memory
        beyond = max(moved - device.cache.capacity, 0.0)
        reading, moving = stored / reach, beyond / reach + (moved - beyond) / device.cache.bandwidth
        busy = max(operations / rate, reading + moving)
        started = 0.0 if operator.kind == "cache" else device.overhead
        seconds = busy + started + self._reducing(operator)
        joules = device.power.peak * busy + device.power.idle * (seconds - busy)
        return Answer(seconds, joules * self.parallel)

    def fit(self, supernet: Supernet, genomes: Sequence[Any], seconds: Sequence[float]) -> Roofline:
        """The roofline made faster or slower, by the one factor that leaves the least squared relative errors.

        Args:
            genomes: whose exports were timed.
            seconds: end to end, for the batch; two or more.

        Raises:
            JointoptError: fewer than two, some that are not above 0, genomes of another space.
        """
        times = times_to_fit("roofline", genomes, seconds, fewest=2)
        ratios = supernet.costs_by(self).columns(supernet.space.canonical(np.array(genomes)))["latency"] / times
        factor = float(ratios.sum() / (ratios**2).sum())
        return replace(self, device=self.device.slower(factor), error=float(np.abs(factor * ratios - 1).mean()))

    def _reducing(self, operator: Operator) -> float:
        """A ring of partial sums: all but one of the parts pass each device twice."""
        network = self.device.network
        if self.parallel == 1 or not operator.reduces or network is None:
            return 0.0
        share = 2 * (self.parallel - 1) / self.parallel
        moved = operator.output_bytes * operator.samples(self.batch) * share
        return moved / network.bandwidth + 2 * (self.parallel - 1) * network.latency
