"""Who evaluates: this process, several on this machine (or a Ray cluster's, see `ray_workers`), the results the same.

A pool gives each idle worker the next few of the genomes that wait, and replaces a worker that dies. Workers are fresh
processes, not forks: a fork inherits neither a usable CUDA nor OpenMP's threads. The super-network and the quality
function are written to a file once, which every worker maps into its memory, so that they share its weights. Sums of
floating-point numbers depend on the number of threads, so that a study keeps to the number it was begun with.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import cloudpickle
import numpy as np
import torch

from jointopt.evaluation.evaluation import Evaluation, LostDevice, Quality
from jointopt.evaluation.sharing import MEMORY, SharedEvaluator
from jointopt.names import NOISY
from jointopt.supernet.state import for_workers
from quant.errors import JointoptError, named_line

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

DEATHS = 3
"""Workers that may die on a genome, or before they are ready, until no other is tried."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of errors of the operating system, a disk's or a file's that can take no more."""

Ended = tuple[int, Evaluation]
"""(number of the evaluation, what came of it)"""


class Evaluator(Protocol):
    """Takes numbered genomes, and gives back their evaluations as each ends, in whatever order.

    Attributes:
        count: how many evaluations run at a time.
    """

    count: int

    def submit(self, numbers: Sequence[int], genomes: np.ndarray) -> None:
        """Adds genomes [n, genes] to those that wait."""

    def collect(self, seconds: float | None) -> list[Ended]:
        """What ended since the last call, or next: one or more, unless `seconds` pass before (where that can be)."""

    def close(self) -> None:
        """Ends all that runs."""


class Serial:
    """Evaluates in this process, with `threads` of torch's."""

    count = 1

    def __init__(self, supernet: Supernet, quality: Quality, threads: int):
        self._threads = threads
        self._evaluator = SharedEvaluator(supernet, quality)
        self._running: deque[Iterator[Ended]] = deque()

    def submit(self, numbers: Sequence[int], genomes: np.ndarray) -> None:
        found = self._evaluator.evaluate(genomes)
        self._running.append((numbers[index], evaluation) for index, evaluation in found)

    def collect(self, seconds: float | None) -> list[Ended]:
        with threads_of_torch(self._threads):
            while self._running:
                for ended in self._running[0]:
                    return [ended]
                self._running.popleft()
        return []

    def close(self) -> None:
        self._running.clear()


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """With this many threads for torch's operators, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Place(Protocol):
    """Where workers live.

    `events` waits for the first of them: ("ready", None), ("ended", (index into the genomes given, evaluation)),
    ("error", what the worker could not do), ("died", why). There are none where `seconds` pass before.
    """

    def start(self, slot: int) -> Any: ...

    def events(self, workers: Sequence[Any], seconds: float | None) -> list[tuple[Any, str, Any]]: ...

    def close(self) -> None: ...


class Pool:
    """Evaluates with up to `count` workers of a place.

    Genomes are given out a few that follow each other at a time, and fewer towards the end, to whoever is idle. A
    genome that a worker died on is run again, alone, and recorded as failed after `DEATHS`.

    Args:
        order: genomes [n, genes] -> their indices, those next to each other that one worker should have.

    Raises:
        JointoptError: workers cannot be started, or cannot load what they are to evaluate.
    """

    def __init__(self, place: Place, count: int, order: Callable[[np.ndarray], np.ndarray]):
        self.count = count
        self._place, self._order = place, order
        self._genomes: dict[int, np.ndarray] = {}
        self._waiting: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self._slots: dict[int, Any] = {}
        self._ready: set[int] = set()
        self._given: dict[int, list[int]] = {}
        self._running: dict[int, list[int]] = {}
        self._stillborn = 0

    def submit(self, numbers: Sequence[int], genomes: np.ndarray) -> None:
        self._genomes.update(zip(numbers, genomes, strict=True))
        self._waiting.extend(numbers[at] for at in self._order(genomes))

    def collect(self, seconds: float | None) -> list[Ended]:
        end = None if seconds is None else time.monotonic() + seconds
        while self._genomes:
            self._hire()
            left = None if end is None else max(0.0, end - time.monotonic())
            slots = {id(worker): slot for slot, worker in self._slots.items()}
            happened = self._place.events(list(self._slots.values()), left)
            found = [self._heard(slots[id(worker)], kind, what) for worker, kind, what in happened]
            ended = [each for each in found if each is not None]
            if ended or not happened:
                return ended
        return []

    def close(self) -> None:
        self._place.close()

    def _hire(self) -> None:
        """Gives the idle something to do, and starts workers that are wanting."""
        for slot in sorted(self._ready):
            if self._waiting and not self._running.get(slot):
                self._given[slot] = self._next()
                self._running[slot] = list(self._given[slot])
                self._slots[slot].give(np.array([self._genomes[number] for number in self._given[slot]]))
        wanted = min(self.count, len(self._genomes))
        for slot in range(self.count):
            if len(self._slots) < wanted and slot not in self._slots:
                self._slots[slot] = self._place.start(slot)

    def _next(self) -> list[int]:
        """What a worker gets next: half an even share of the waiting genomes; one that a worker died on goes alone."""
        size = math.ceil(len(self._waiting) / (2 * self.count))
        taken = [self._waiting.popleft()]
        while len(taken) < size and not self._deaths[taken[0]] and not self._deaths[self._waiting[0]]:
            taken.append(self._waiting.popleft())
        return taken

    def _heard(self, slot: int, kind: str, what: Any) -> Ended | None:
        if kind == "error":
            raise JointoptError(f"workers: {what}")
        if kind == "ready":
            self._ready.add(slot)
            self._stillborn = 0
            return None
        if kind == "ended":
            index, evaluation = what
            number = self._given[slot][index]
            self._running[slot].remove(number)
            del self._genomes[number]
            return number, evaluation
        return self._died(slot, what)

    def _died(self, slot: int, reason: str) -> Ended | None:
        """The first genome of those it had left is the one it died on; the others go to someone else."""
        del self._slots[slot]
        left = self._running.pop(slot, [])
        if slot not in self._ready:
            self._stillborn += 1
            if self._stillborn == DEATHS:
                raise JointoptError(f"workers: {DEATHS} in a row ended before they were ready, the last {reason}")
        self._ready.discard(slot)
        if not left:
            return None
        number, *others = left
        self._deaths[number] += 1
        if self._deaths[number] < DEATHS:
            self._waiting.extendleft(reversed(left))
            return None
        self._waiting.extendleft(reversed(others))
        del self._genomes[number]
        return number, Evaluation(None, f"{DEATHS} workers died on it, the last {reason}", 0.0)


class Processes:
    """Workers that are processes of this machine, each with `threads` of torch's; GPUs are dealt out in turn.

    Raises:
        JointoptError: a quality function that no other process can be sent, a full disk, no POSIX system.
    """

    def __init__(self, supernet: Supernet, quality: Quality, count: int, threads: int):
        if os.name != "posix":
            raise JointoptError(f"workers: found {count} on {sys.platform}; allowed: 1, or Linux or macOS")
        self._threads = threads
        self._gpus = visible_gpus() if supernet.device.type == "cuda" else []
        self._alive: list[Process] = []
        self._write = partial(write_payload, supernet, quality, count, threads)
        self.payload: Path | None = None

    def start(self, slot: int) -> Process:
        if self.payload is None:
            self.payload = self._write()
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        worker = Process(self.payload, self._threads, gpu)
        self._alive.append(worker)
        return worker

    def events(self, workers: Sequence[Process], seconds: float | None) -> list[tuple[Process, str, Any]]:
        by_connection = {worker.connection: worker for worker in workers}
        found: list[tuple[Process, str, Any]] = []
        for connection in wait(list(by_connection), seconds):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                kind, what = worker.connection.recv()
            except (EOFError, OSError):
                kind, what = "died", worker.cause_of_death()
                self._alive.remove(worker)
                worker.end()
            found.append((worker, kind, what))
        return found

    def close(self) -> None:
        for worker in self._alive:
            worker.end()
        self._alive.clear()
        if self.payload is not None:
            self.payload.unlink(missing_ok=True)


class Process:
    """One worker process. Its standard input is the lifeline: where this process ends in any way, so does that."""

    def __init__(self, payload: Path, threads: int, gpu: str | None):
        self.connection, other = multiprocessing.Pipe()
        place = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, **place}
        begin = "import logging, sys; "
        for name in NOISY:
            begin += f"logging.getLogger({name!r}).setLevel({logging.getLogger(name).level}); "
        begin += f"sys.path[:] = {sys.path!r}; from jointopt.evaluation import workers; "
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-c", begin + f"workers.serve({other.fileno()}, {str(payload)!r}, {threads})"],
                stdin=subprocess.PIPE,
                pass_fds=[other.fileno()],
                env=environment,
                # What ends all processes of a terminal or a job is this one's to deal with, and theirs to outlive by a
                # moment: they remove the file where this one no longer can.
                start_new_session=True,
            )

    def give(self, genomes: np.ndarray) -> None:
        # One that has just died is found out when it is listened to.
        with contextlib.suppress(OSError):
            self.connection.send(genomes)

    def cause_of_death(self) -> str:
        """Of one whose connection is closed."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "silent"
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.connection.close()


def serve(descriptor: int, payload: str, threads: int) -> None:
    """The whole life of a worker process."""
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with_parent, args=(payload,), daemon=True).start()
    with Connection(descriptor) as connection:
        tell = partial(_or_end, payload, connection.send)
        try:
            evaluator = read_payload(payload, threads)
            tell(("ready", None))
            while True:
                for ended in evaluator.evaluate(_or_end(payload, connection.recv)):
                    tell(("ended", ended))
        except LostDevice as error:
            sys.exit(str(error))  # another takes over; a genome that three are lost on has failed
        except JointoptError as error:
            tell(("error", str(error)))


def _or_end(payload: str, step: Callable[..., Any], *arguments: Any) -> Any:
    """What a step of the connection gives, where there is still someone at its other end."""
    try:
        return step(*arguments)
    except (EOFError, OSError):
        _end(payload)


def _end_with_parent(payload: str) -> None:
    os.read(0, 1)  # not of sys.stdin, whose lock Python wants when it ends
    _end(payload)


def _end(payload: str) -> NoReturn:
    """Whichever thread sees first that the search is gone leaves neither the file nor a complaint behind."""
    Path(payload).unlink(missing_ok=True)
    os._exit(1)


def write_payload(supernet: Supernet, quality: Quality, count: int, threads: int) -> Path:
    """All that `count` workers need, in a new temporary file.

    Raises:
        JointoptError: what cannot be written, because of the disk or of what it is.
    """
    descriptor, path = tempfile.mkstemp(prefix="jointopt-", suffix=".pt")
    os.close(descriptor)
    try:
        with threads_of_torch(threads):
            content = SharedEvaluator(for_workers(supernet, count), quality, MEMORY // count)
        with open(path, "wb") as file:
            torch.save(content, file, pickle_module=cloudpickle, pickle_protocol=5)
    except BaseException as error:
        os.unlink(path)
        if not isinstance(error, Exception):
            raise
        disk = error if isinstance(error, OSError) else error.__context__  # which torch's own error hides
        if isinstance(disk, OSError) and disk.errno in FULL:
            raise JointoptError(
                f"workers: {path!r} cannot be written: {disk.strerror}; allowed: a folder with room, by TMPDIR"
            ) from error
        raise JointoptError(
            f"workers: the quality function or the super-network cannot be sent to another process: {named_line(error)}"
        ) from error
    return Path(path)


def read_payload(path: str | Path, threads: int) -> SharedEvaluator:
    """What evaluates, as `write_payload` wrote it, its tensors mapped from the file: all workers of a machine share
    their memory, and one that writes to a tensor gets a copy of its own.

    Raises:
        JointoptError: something that it refers to cannot be imported here.
    """
    torch.set_num_threads(threads)
    try:
        return torch.load(path, map_location=_first_gpu, mmap=True, weights_only=False)
    except Exception as error:
        told = named_line(error)
        raise JointoptError(f"the quality function or the super-network cannot be loaded: {told}") from None


def _first_gpu(storage: Any, location: str) -> Any:
    """What was on a GPU goes to the first that this process sees: each may see another. All else, where it was."""
    return storage.cuda(0) if location.startswith("cuda") else None


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(at) for at in range(torch.cuda.device_count())]
