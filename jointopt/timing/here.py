"""This machine's look-up for a run: timed, fitted by a few sub-networks that are exported and run, and kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jointopt.batches import first_samples, lengths, of_average_length, sample_count
from jointopt.files import reading, write_whole
from jointopt.targets import TARGETS
from jointopt.timing.backend import ONNXRUNTIME
from jointopt.timing.lookup import Lookup
from jointopt.timing.timers import time_exports
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

FITTED = ("seconds", "factors", "error")
FITTED_BY = 4
"""Random sub-networks that the look-up is fitted by, beside the smallest and the largest."""


def lookup_here(
    supernet: Supernet,
    batch: int,
    threads: int,
    inputs: Sequence[Mapping[str, Any]],
    kept: Path,
    seed: int,
    backend: str = ONNXRUNTIME,
) -> Lookup:
    """The look-up of a calibrated super-network on this machine.

    Args:
        inputs: batches of the model's inputs, from which what is timed end to end takes its samples.
        kept: the file of what was fitted, so that a run that goes on goes on with the same numbers.
        backend: see `Lookup.of`.
    """
    lookup = Lookup.of(supernet, batch, threads=threads, backend=backend)
    if kept.is_file():
        return replace(lookup, **_read(kept, lookup.backend.machine))
    genomes = [supernet.space.smallest, supernet.space.largest, *supernet.space.sample(FITTED_BY, seed)]
    with tempfile.TemporaryDirectory() as place:
        folders = (_exported(supernet, genome, Path(place) / str(at), backend) for at, genome in enumerate(genomes))
        seconds = time_exports(folders, batch_of(inputs, batch), lookup.backend)
    fitted = lookup.fit(supernet, genomes, seconds)
    record = {"machine": lookup.backend.machine, **{name: getattr(fitted, name) for name in FITTED}}
    write_whole(kept, json.dumps(record, indent=1), "hardware")
    return fitted


def _read(kept: Path, machine: str) -> dict[str, Any]:
    with reading(f"hardware: {str(kept)!r}", "remove it"):
        record = json.loads(kept.read_text())
        fitted = {name: record[name] for name in FITTED}
        found = record["machine"]
    if found != machine:
        raise JointoptError(
            f"hardware: {str(kept)!r} is of {found}; this is {machine}; allowed: remove it, or another output"
        )
    return fitted


def _exported(supernet: Supernet, genome: Any, folder: Path, backend: str) -> Path:
    from jointopt.checkpoint.writer import export

    target = next(name for name, each in TARGETS.items() if each.backend == backend)
    return export(supernet, genome, folder, target=target)


def batch_of(inputs: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """The first samples of the first batch, of average length. Raises JointoptError where it has fewer."""
    if sample_count(inputs[0]) < size:
        raise JointoptError(
            f"hardware.batch: found {size}; allowed: up to {sample_count(inputs[0])}, a batch of data.calibrate"
        )
    found = [each for batch in inputs for each in lengths(batch)]
    return of_average_length(first_samples(inputs[0], size), found)
