"""From a config's `hardware:` to what answers for time: a device's roofline, or this machine's look-up, which is timed,
fitted by a few sub-networks that are exported and run, and kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jointopt.batches import Batch, first_samples, lengths, of_average_length, sample_count
from jointopt.files import reading, write_whole
from jointopt.targets import TARGETS
from jointopt.timing.backend import ONNXRUNTIME, Backend
from quant.errors import JointoptError, said_of

if TYPE_CHECKING:
    from jointopt.config.config import Config
    from jointopt.cost.roofline import Roofline
    from jointopt.study.study import Study
    from jointopt.supernet.supernet import Supernet
    from jointopt.timing.lookup import Lookup

LATENCY = "latency.json"
"""In a run's output: what was timed and fitted of this machine."""
FITTED = ("seconds", "factors", "error")
FITTED_BY = 4
"""Random sub-networks that the look-up is fitted by, beside the smallest and the largest."""


def latency_of(config: Config) -> Roofline | None:
    """What answers for time, energy and memory on the config's hardware, where that is a device and not this machine.

    Raises:
        JointoptError: an unknown device, a file that lacks a figure, a context for a model that reads no tokens.
    """
    from jointopt.cost.device import load_device
    from jointopt.cost.roofline import Roofline

    if config.hardware is None or config.hardware.is_this_machine:
        return None
    wanted = config.hardware
    return Roofline(load_device(wanted.device), wanted.batch, wanted.context, wanted.parallel)


def check_timed(config: Config, supernet: Supernet) -> None:
    """Raises JointoptError where the config's hardware is this machine, and what it runs cannot be timed here."""
    wanted = config.hardware
    if wanted is not None and wanted.is_this_machine:
        with said_of("hardware.device this"):
            Backend.of(supernet, _backend(config), wanted.threads)


def look_up(config: Config, inputs: Sequence[Batch], supernet: Supernet) -> None:
    """Has this machine's own times answer, where the config's hardware is this machine."""
    wanted = config.hardware
    if wanted is not None and wanted.is_this_machine:
        check_timed(config, supernet)
        kept, seed = Path(config.output) / LATENCY, config.search.seed
        backend = _backend(config)
        supernet.use_latency(lookup_here(supernet, wanted.batch, wanted.threads, inputs, kept, seed, backend))


def _backend(config: Config) -> str:
    found = TARGETS[config.target].backend
    assert found is not None  # else the config was refused
    return found


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
    from jointopt.timing.lookup import Lookup
    from jointopt.timing.timers import time_exports

    lookup = Lookup.of(supernet, batch, threads=threads, backend=backend)
    if kept.is_file():
        return replace(lookup, **_read(kept, lookup.backend.machine))
    genomes = [supernet.space.smallest, supernet.space.largest, *supernet.space.sample(FITTED_BY, seed)]
    with tempfile.TemporaryDirectory() as place:
        folders = (_exported(supernet, genome, Path(place) / str(at), backend) for at, genome in enumerate(genomes))
        seconds = time_exports(folders, _batch_of(inputs, batch), lookup.backend)
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
    from jointopt.checkpoint.exporting import export

    target = next(name for name, each in TARGETS.items() if each.backend == backend)
    return export(supernet, genome, folder, target=target)


def _batch_of(inputs: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """The first samples of the first batch, of average length. Raises JointoptError where it has fewer."""
    if sample_count(inputs[0]) < size:
        raise JointoptError(
            f"hardware.batch: found {size}; allowed: up to {sample_count(inputs[0])}, a batch of data.calibrate"
        )
    found = [each for batch in inputs for each in lengths(batch)]
    return of_average_length(first_samples(inputs[0], size), found)


def measured_beside(
    config: Config,
    inputs: Sequence[Batch],
    supernet: Supernet,
    study: Study,
    genome: np.ndarray,
    folder: Path,
) -> str:
    """What the export takes on this machine, end to end, beside what the search reckoned with: a line."""
    from jointopt.timing.timers import time_export

    assert config.hardware is not None and supernet.latency is not None
    backend = Backend.of(supernet, _backend(config), config.hardware.threads)
    found = time_export(folder, _batch_of(inputs, config.hardware.batch), backend)
    expected = float(supernet.costs(genome)["latency"])
    study.note("measured_latency", {"genome": genome.tolist(), "measured": found, "expected": expected})
    return f"latency of the export: {found * 1e3:.4g} ms measured, {expected * 1e3:.4g} ms by {supernet.latency.source}"
