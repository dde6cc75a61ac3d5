"""Workers on a Ray cluster, for `workers.Pool`: one actor each, placed by Ray, on whatever node has room.

What they evaluate is put into Ray's object store once. The first worker of a node writes it to a file there, which
the others map too.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from jointopt.evaluation.evaluation import Quality
from jointopt.evaluation.workers import Ended, read_payload, write_payload
from jointopt.supernet.supernet import Supernet
from quant.errors import JointoptError, in_one_line


class Remote:
    """The actor: a super-network and a quality function on some node, with `threads` of torch's."""

    def __init__(self, name: str, content: np.ndarray, paths: list[str], threads: int):
        # As in a local worker, what the search's process can import can be imported here, where it is there at all.
        sys.path += [path for path in paths if path not in sys.path]
        self._file = Path(tempfile.gettempdir()) / name
        if not self._file.exists():
            beside = self._file.with_suffix(f".{os.getpid()}")
            beside.write_bytes(content.data)
            beside.replace(self._file)
        self._complaint = None
        try:
            self._evaluator = read_payload(self._file, threads)
        except JointoptError as error:
            self._complaint = str(error)

    def ready(self) -> str | None:
        """Answers once there is something to evaluate with, or with why there is not."""
        return self._complaint

    def evaluate(self, genomes: np.ndarray) -> Iterator[Ended]:
        yield from self._evaluator.evaluate(genomes)

    def clean(self) -> None:
        """Its file goes; what is mapped of it stays."""
        self._file.unlink(missing_ok=True)


def _reach(address: str) -> None:
    """Raises OSError where nobody listens at host:port, at which Ray would knock for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


class Actor:
    """One worker, as the pool holds it.

    Attributes:
        awaited: what the next event comes from: that it is ready, or the evaluations of the genomes given last.
    """

    def __init__(self, handle: Any):
        self.handle = handle
        self.awaited: Any = handle.ready.remote()
        self.is_ready = False

    def give(self, genomes: np.ndarray) -> None:
        self.awaited = self.handle.evaluate.options(num_returns="streaming").remote(genomes)


class Cluster:
    """Workers on the Ray cluster at `address` ("auto": the one of this machine), each with `threads` CPUs, or a GPU.

    Attributes:
        room: how many of them the cluster has room for now.

    Raises:
        JointoptError: there is no cluster, or none with room for one.
    """

    def __init__(self, address: str, supernet: Supernet, quality: Quality, count: int | None, threads: int):
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                _reach(address)
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            except (OSError, ValueError, RuntimeError, RayError) as error:
                told = in_one_line(error)
                raise JointoptError(
                    f"ray: no cluster at {address!r}: {told}; allowed: an address, or auto after `ray start --head`"
                ) from None
        self._needs = {"num_cpus": threads}
        resource, each = "CPU", threads
        if supernet.device.type == "cuda":
            self._needs["num_gpus"] = 1
            resource, each = "GPU", 1
        self._threads = threads
        self._actors: list[Actor] = []
        self.room = int(ray.cluster_resources().get(resource, 0)) // each
        try:
            if not self.room:
                raise JointoptError(f"ray: the cluster at {address!r} has no {each} {resource} for a worker")
            self._content, self._name = self._stored(supernet, quality, count or self.room, threads)
        except BaseException:
            self.close()
            raise

    def _stored(self, supernet: Supernet, quality: Quality, count: int, threads: int) -> tuple[Any, str]:
        """A reference to what workers need in the object store, and a name for its file that no other search uses."""
        path = write_payload(supernet, quality, count, threads)
        try:
            return ray.put(np.fromfile(path, dtype=np.uint8)), path.name
        finally:
            path.unlink()

    def start(self, slot: int) -> Actor:
        made = ray.remote(Remote).options(**self._needs)
        self._actors.append(Actor(made.remote(self._name, self._content, sys.path, self._threads)))
        return self._actors[-1]

    def events(self, workers: Sequence[Actor], seconds: float | None) -> list[tuple[Actor, str, Any]]:
        end = None if seconds is None else time.monotonic() + seconds
        found: list[tuple[Actor, str, Any]] = []
        while not found:
            awaited = {worker.awaited: worker for worker in workers if worker.awaited is not None}
            left = None if end is None else max(0.0, end - time.monotonic())
            happened, _ = ray.wait(list(awaited), timeout=left)
            if not happened:
                return []
            found = [(awaited[each], *event) for each in happened if (event := self._heard(awaited[each]))]
        return found

    def _heard(self, worker: Actor) -> tuple[str, Any] | None:
        try:
            if worker.is_ready:
                return "ended", ray.get(next(worker.awaited))
            complaint = ray.get(worker.awaited)
        except StopIteration:
            worker.awaited = None
            return None
        except RayActorError as error:
            self._actors.remove(worker)
            return "died", f"with its node or process ({type(error).__name__})"
        except RayTaskError as error:
            return "error", str(error.cause)
        worker.awaited, worker.is_ready = None, True
        return ("ready", None) if complaint is None else ("error", complaint)

    def close(self) -> None:
        """Ends the workers, and the connection where it was made here."""
        # First those that have no room yet, or they would take that of the others.
        for worker in self._actors:
            if not worker.is_ready:
                ray.kill(worker.handle)
        cleaned = [worker.handle.clean.remote() for worker in self._actors if worker.is_ready]
        if cleaned:
            # One that is busy, or has no node, is not waited for.
            ray.wait(cleaned, num_returns=len(cleaned), timeout=2)
        for worker in self._actors:
            ray.kill(worker.handle)
        self._actors.clear()
        if self._ours:
            ray.shutdown()
