"""From a config's `hardware:` to the model of latency that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jointopt.timing.backend import Backend
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.batches import Batch
    from jointopt.config.config import Config
    from jointopt.cost.roofline import Roofline
    from jointopt.study.study import Study
    from jointopt.supernet.supernet import Supernet

LATENCY = "latency.json"
"""In a run's output: what was timed and fitted of this machine."""


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
    if wanted is None or not wanted.is_this_machine:
        return
    try:
        Backend.of(supernet, _backend(config), wanted.threads)
    except JointoptError as error:
        raise JointoptError(f"hardware.device this: {error}") from None


def look_up(config: Config, inputs: Sequence[Batch], supernet: Supernet) -> None:
    """Has this machine's own times answer, where the config's hardware is this machine."""
    from jointopt.timing.here import lookup_here

    wanted = config.hardware
    if wanted is not None and wanted.is_this_machine:
        check_timed(config, supernet)
        kept, seed = Path(config.output) / LATENCY, config.search.seed
        backend = _backend(config)
        supernet.use_latency(lookup_here(supernet, wanted.batch, wanted.threads, inputs, kept, seed, backend))


def _backend(config: Config) -> str:
    from jointopt.targets import TARGETS

    found = TARGETS[config.target].backend
    assert found is not None  # else the config was refused
    return found


def measured_beside(
    config: Config,
    inputs: Sequence[Batch],
    supernet: Supernet,
    study: Study,
    genome: np.ndarray,
    folder: Path,
) -> str:
    """What the export takes on this machine, end to end, beside what the search reckoned with: a line."""
    from jointopt.timing.here import batch_of
    from jointopt.timing.timers import time_export

    assert config.hardware is not None and supernet.latency is not None
    backend = Backend.of(supernet, _backend(config), config.hardware.threads)
    found = time_export(folder, batch_of(inputs, config.hardware.batch), backend)
    expected = float(supernet.costs(genome)["latency"])
    study.note("measured_latency", {"genome": genome.tolist(), "measured": found, "expected": expected})
    return f"latency of the export: {found * 1e3:.4g} ms measured, {expected * 1e3:.4g} ms by {supernet.latency.source}"
