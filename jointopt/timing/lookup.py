"""Latency by look-up: every distinct operator timed once on this machine, and kept in a file.

    lookup = jointopt.Lookup.of(supernet, batch=1, threads=2)      # times what the file lacks, in ONNX Runtime
    lookup = jointopt.Lookup.of(supernet, backend="torch")         # in torch, on the super-network's device
    supernet.use_latency(lookup)

What a graph adds to its operators (activations, residual sums, fusions) is fitted from a few sub-networks that are
timed end to end: `fit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from jointopt.cost.operators import Answer, Operator, times_to_fit
from jointopt.files import locked, reading, write_whole, writing
from jointopt.names import MOST
from jointopt.timing.backend import ONNXRUNTIME, TORCH, Backend, host
from quant.errors import JointoptError, check_count
from quant.kernels.cpu import cache_folder

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

TOGETHER = 10**9
"""Bytes of weights in float32 of operators that are timed in turns, so that what else the machine does falls on all of
them: within a minute it may be half as fast again, and what fewer operators leave in its caches makes each faster."""
ANCHORS, LONG = 8, 2e-5
"""Operators timed already that are timed again with others, for how fast the machine is by then; and seconds that they
take at least, since those of shorter ones are half noise."""
WAIT = 30.0
"""Seconds that another process may be writing to the file."""
_WIDTHS = (("rows",), ("columns",), ("rows", "columns"), ("rows", "columns", "heads"), ("rows", "heads"))
"""What grows with a width: an output's, an input's, a norm's, attention's, a depthwise convolution's."""
Key = str


def default_path() -> Path:
    """Where timings of this machine are kept."""
    return cache_folder() / "operators.json"


@dataclass(frozen=True)
class Lookup:
    """Times of operators on one machine.

    Attributes:
        backend: what they were timed in.
        batch, context: see `LatencyModel`.
        seconds: `key_of` an operator -> its time for the batch.
        factors: feature -> what its sum is multiplied by, as `fit` finds them: "operators" (their times), "attention"
            (again those of attention), "layers" (seconds for each linear layer or convolution); in torch also
            "quantized" (seconds for each that is in a number format, which compressed-tensors' own forward takes).
        error: mean absolute relative error of the fit, end to end; None where nothing was fitted.
    """

    backend: Backend
    batch: int = 1
    context: int | None = None
    seconds: Mapping[Key, float] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=lambda: {"operators": 1.0, "attention": 0.0, "layers": 0.0})
    error: float | None = None

    @classmethod
    def of(
        cls,
        supernet: Supernet,
        batch: int = 1,
        context: int | None = None,
        threads: int = 1,
        path: str | Path | None = None,
        backend: str = ONNXRUNTIME,
    ) -> Lookup:
        """The look-up for all sub-networks of a super-network; operators that the file lacks are timed now.

        Args:
            threads: of the CPU.
            path: the file of timings (default: one for all, and for all machines of a home, in the user's cache
                folder).
            backend: "onnxruntime"; or "torch", on the super-network's device, where all formats of weights take the
                time of unquantized ones and no others are allowed (`Backend`).

        Raises:
            JointoptError: a file of another machine, or one that cannot be read or written; an unknown backend, or a
                space that it cannot time.
        """
        runs = Backend.of(supernet, backend, threads)
        asked = {key_of(op, batch): op for op in map(runs.computed, operators_of(supernet, batch, context))}
        wanted = sorted(asked)
        seconds = times_of([asked[key] for key in wanted], batch, runs, path)
        return cls(runs, batch, context, dict(zip(wanted, seconds, strict=True)))

    @property
    def source(self) -> str:
        off = "" if self.error is None else f", {self.error:.0%} off where it was fitted end to end"
        return f"look-up on {self.backend.machine}{off}"

    @property
    def capacity(self) -> float:
        return self.backend.memory

    def described(self) -> dict[str, Any]:
        return {
            "model": "lookup",
            "source": self.source,
            "batch": self.batch,
            "context": self.context,
            "parallel": 1,
            "factors": dict(self.factors),
            "seconds": hashlib.sha256(json.dumps(sorted(self.seconds.items())).encode()).hexdigest()[:16],
        }

    def answer(self, operator: Operator) -> Answer:
        """Energy is not a number: nothing measures it."""
        if operator.kind == "cache":
            return Answer(0.0, float("nan"))
        time = self.time_of(operator)
        total = time * self.factors["operators"]
        if operator.kind == "attention":
            total += time * self.factors["attention"]
        if operator.kind in ("linear", "conv"):
            total += self.factors["layers"]
            if operator.scheme is not None and operator.scheme.weights is not None:
                total += self.factors.get("quantized", 0.0)
        return Answer(total, float("nan"))

    def time_of(self, operator: Operator) -> float:
        """As it was timed alone; of a width that was not, on the line between its neighbours.

        Raises:
            JointoptError: neither it nor wider and narrower ones were timed.
        """
        operator = self.backend.computed(operator)
        found = self.seconds.get(key_of(operator, self.batch))
        return self._between(operator) if found is None else found

    def _between(self, operator: Operator) -> float:
        wanted = _record(operator, self.batch)
        timed = [(json.loads(key), seconds) for key, seconds in self.seconds.items()]
        for sides in _WIDTHS:
            near = sorted(
                (scale, seconds) for record, seconds in timed if (scale := _scale(record, wanted, sides)) is not None
            )
            if near and near[0][0] <= 1 <= near[-1][0]:
                sizes, times = zip(*near, strict=True)
                return float(np.interp(1.0, sizes, times))
        scheme = operator.scheme.name if operator.scheme else "none"
        raise JointoptError(
            f"lookup: no timing of {operator.kind} {operator.rows} x {operator.columns} in {scheme} at "
            f"{operator.positions:g} positions; allowed: widths between those timed, one at a time; "
            "Lookup.of(supernet) times all"
        )

    def fit(self, supernet: Supernet, genomes: Sequence[Any], seconds: Sequence[float]) -> Lookup:
        """The look-up with factors by which sums over operators come closest to end-to-end times.

        Args:
            genomes: whose exports were timed.
            seconds: end to end, for the batch; three or more.

        Raises:
            JointoptError: fewer than three, some that are not above 0, genomes of another space.
        """
        times = times_to_fit("lookup", genomes, seconds, fewest=3)
        names = ["operators", "attention", "layers", *(["quantized"] if self.backend.name == TORCH else [])]
        canonical = supernet.space.canonical(np.array(genomes))
        columns = [
            supernet.costs_by(replace(self, factors={**dict.fromkeys(names, 0.0), name: 1.0})).columns(canonical)
            for name in names
        ]
        features = np.stack([each["latency"] for each in columns], axis=1)
        weights, _ = nnls(features / times[:, None], np.ones(len(times)))  # relative errors, nothing negative
        error = float(np.abs(features @ weights / times - 1).mean())
        return replace(self, factors=dict(zip(names, weights.tolist(), strict=True)), error=error)


def operators_of(supernet: Supernet, batch: int = 1, context: int | None = None) -> list[Operator]:
    """The distinct operators of all sub-networks of a super-network, but for reading caches."""
    check_count("batch", batch, MOST["batch"])
    check_count("context", context, MOST["context"])
    asked = _Asked(batch, context)
    supernet.costs_by(asked)
    return list({key_of(each, batch): each for each in asked.operators}.values())


def times_of(
    operators: Sequence[Operator], batch: int, backend: Backend, path: str | Path | None = None
) -> list[float]:
    """Seconds of each operator on this machine, for a batch: from the file of timings, or timed now and kept there,
    group by group: what is done stays where one is interrupted.

    Raises:
        JointoptError: a file of another machine, or one that cannot be read or written.
    """
    machine = backend.machine
    shared = path is None
    path = default_path() if path is None else Path(path)
    known = _read(path, machine, shared)
    asked = {key_of(each, batch): each for each in operators}
    lacking = [key for key in asked if key not in known]
    if lacking:
        known = _kept(path, machine, {})  # found out before the timing, not after it
    for group in _groups(lacking, asked):
        known = _kept(path, machine, _timed(group, asked, known, batch, backend))
    return [known[key_of(each, batch)] for each in operators]


@dataclass
class _Asked:
    """Stands in for a model of latency, and notes what it is asked."""

    batch: int
    context: int | None
    operators: list[Operator] = field(default_factory=list)
    source: str = "nothing"
    capacity: float = float("inf")

    def described(self) -> dict[str, Any]:
        return {}

    def answer(self, operator: Operator) -> Answer:
        if operator.kind != "cache":
            self.operators.append(operator)
        return Answer(0.0, 0.0)


def _record(operator: Operator, batch: int) -> dict[str, Any]:
    return {
        "kind": operator.kind,
        "rows": operator.rows,
        "columns": operator.columns,
        "positions": operator.positions,
        "context": operator.context,
        "area": operator.area,
        "heads": operator.heads,
        "scheme": operator.scheme.name if operator.scheme else "none",
        "batch": operator.samples(batch),
        **({"fused": operator.fused} if operator.kind == "conv" else {}),
    }


def _scale(record: Mapping[str, Any], wanted: Mapping[str, Any], sides: Sequence[str]) -> float | None:
    """How many times as wide a record's operator is as the wanted one; None where they differ in more than that, or
    not all of these sides grew alike."""
    left_out, first = dict.fromkeys(sides), sides[0]
    if {**record, **left_out} != {**wanted, **left_out}:
        return None
    if any(record[side] * wanted[first] != wanted[side] * record[first] for side in sides):
        return None
    return record[first] / wanted[first]


def key_of(operator: Operator, batch: int) -> Key:
    """What a timing depends on, as JSON."""
    return json.dumps(_record(operator, batch), sort_keys=True)


def _timed(
    group: Sequence[Key], asked: Mapping[Key, Operator], known: Mapping[Key, float], batch: int, backend: Backend
) -> dict[Key, float]:
    """Times of a group of what is asked, as the machine was when those known were timed."""
    from jointopt.timing.timers import time_operators

    timed = {key: seconds for key, seconds in known.items() if key in asked and seconds > LONG}
    anchors = sorted(timed, key=timed.__getitem__)[:: max(1, -(-len(timed) // ANCHORS))]
    now = time_operators([asked[key] for key in (*group, *anchors)], batch, backend)
    slower = [each / timed[key] for key, each in zip(anchors, now[len(group) :], strict=True) if each > LONG]
    pace = float(np.median(slower)) if slower else 1.0
    return {key: each / pace for key, each in zip(group, now, strict=False)}


def _groups(keys: Sequence[Key], asked: Mapping[Key, Operator]) -> list[list[Key]]:
    """Of about equal size, each within `TOGETHER`; cheap and expensive ones in all of them."""
    keys = sorted(keys, key=lambda key: (asked[key].macs, key))
    count = 1 + sum(4 * _stored(asked[key]) for key in keys) // TOGETHER
    return [keys[at::count] for at in range(min(count, len(keys)))]


def _stored(operator: Operator) -> int:
    """Numbers of an operator's weight, as it is timed."""
    if operator.kind in ("linear", "conv"):
        return operator.rows * operator.columns * operator.area
    return 0


def _read(path: Path, machine: str, shared: bool) -> dict[Key, float]:
    """What was timed on this machine. A file of other machines alone is refused, unless it is `shared` by them."""
    machines = _machines(path)
    if not shared and machines and not any(each.startswith(f"{host()}, ") for each in machines):
        told = "; ".join(machines)
        raise JointoptError(f"lookup: {str(path)!r} was timed on another machine ({told}); allowed: another path")
    return machines.get(machine, {})


def _machines(path: Path) -> dict[str, dict[Key, float]]:
    """All that the file holds, by machine."""
    if not path.exists():
        return {}
    with reading(f"lookup: {str(path)!r}", "remove it"):
        return {machine: dict(times) for machine, times in json.loads(path.read_text())["machines"].items()}


def _kept(path: Path, machine: str, found: Mapping[Key, float]) -> dict[Key, float]:
    """Adds times to the file, but for what another process has timed meanwhile. Returns all of this machine's."""
    what, lock = f"lookup: {str(path)!r}", Path(f"{path}.lock")
    with writing(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with closing(locked(lock, what, WAIT)):
        machines = _machines(path)
        known = {**found, **machines.get(machine, {})}
        write_whole(path, json.dumps({"machines": {**machines, machine: known}}, indent=1), "lookup")
    return known
