"""Is an export what the study said? Reloaded in a process without jointopt, scored again, weighed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.checkpoint.exporting import RECORD, UNCHANGED, stored_bytes
from jointopt.checkpoint.probe import probe_inputs, probed
from jointopt.checkpoint.reload import receive, send
from jointopt.evaluation.evaluation import Quality, measured
from jointopt.files import DAMAGED, check_path, reading
from jointopt.installed import lacking
from jointopt.targets import TARGETS, check_installed
from quant.errors import JointoptError, check_kind, in_one_line
from quant.formats import scheme

_SECONDS = 900.0


@dataclass(frozen=True)
class Allowance:
    """How far a reloaded export may be from what was scored.

    Attributes:
        outputs: of those for the probe, times the largest.
        metrics: times the larger of 1 and the recorded value.
        by_median: whether half of the outputs may be further away.
    """

    outputs: float
    metrics: float
    by_median: bool = False


SAME = Allowance(1e-4, 1e-3)
"""Of what computes the same, but for the order of sums."""
SAME_IN_16_BITS = Allowance(2e-2, 1e-3)
NARROWER = Allowance(2e-2, 5e-2)
"""Of 16-bit arithmetic in place of 32-bit, here or there."""
ROUNDED = Allowance(5e-2, 5e-2, by_median=True)
"""Of inputs that are rounded after other sums."""


def allowance(record: Mapping[str, Any], dtype: torch.dtype) -> Allowance:
    """By what an export's target computes otherwise than the search did; `dtype` is the reloaded model's."""
    schemes = [scheme(layer["scheme"]) for layer in record["layers"]]
    # ONNX Runtime adds whole numbers where torch adds their products with a scale: a last bit apart, which the next
    # layer's rounding can turn into a step. In random BERTs of six blocks that takes single samples up to 0.18 of the
    # largest output away, and half of them at most 0.02; another model's outputs are away in all of them. Of 400
    # samples three got another class.
    if _target(record) == "onnxruntime" and any(each.activations for each in schemes):
        return ROUNDED
    # A GGUF file is read into float32, whatever the model computed in.
    widened = _target(record) == "gguf" and record.get("dtype") == "bfloat16"
    # bitsandbytes computes 4-bit layers in bfloat16 wherever a CPU has it, whatever the model's dtype.
    if widened or any(each.bitsandbytes for each in schemes):
        return NARROWER
    return SAME if dtype == torch.float32 else SAME_IN_16_BITS


@dataclass(frozen=True)
class Verification:
    """What verifying found.

    Attributes:
        differences: one line each; empty where the export is what was recorded.
        metrics: of the reloaded model, {} where no quality function was given.
        size: bytes of the tensors on disk.
    """

    differences: tuple[str, ...]
    metrics: dict[str, float]
    size: int

    @property
    def ok(self) -> bool:
        return not self.differences


def verify(folder: str | Path, quality: Quality | None = None, device: str = "cpu") -> Verification:
    """Reloads an exported folder in a fresh process, by transformers, timm or ONNX Runtime alone, and compares it with
    its record.

    Compared are the outputs for the record's probe, the metrics of `quality` with those that the search measured for
    this genome (where it did), and the bytes on disk with the reported size. Metrics may differ by 0.001 times the
    larger of 1 and the recorded value where the export computes what was scored; by 0.05 times that where it cannot to
    the last bit (bitsandbytes, GGUF of bfloat16 models, inputs that ONNX Runtime rounds), which may decide single
    samples.

    Args:
        quality: the function that the search used; its model's forward passes run in the other process.
        device: where the other process runs the model; ONNX Runtime runs it on the CPU.

    Raises:
        JointoptError: no such folder or no record in it, a quality function that fails, or an export for bitsandbytes
            where that is not installed.
    """
    record = read_record(folder)
    folder = Path(folder)
    _check_installed(folder, record)
    if TARGETS[_target(record)].cpu_alone:
        device = "cpu"
    differences = []
    size = stored_bytes(folder)
    recorded_size = record.get("stored", record["costs"]["size"])
    if size != recorded_size:
        differences.append(f"size: {size} bytes on disk, {recorded_size} recorded")
    metrics: dict[str, float] = {}
    try:
        with reloaded(folder, device) as model:
            allowed = allowance(record, model.dtype)
            differences += _probe_differences(model, record, allowed)
            if quality is not None:
                metrics = _scored(quality, model, differences)
                differences += _metric_differences(metrics, record, allowed)
    except ReloadError as error:
        differences.append(f"reload: {error}")
    return Verification(tuple(differences), metrics, size)


def _scored(quality: Quality, model: nn.Module, differences: list[str]) -> dict[str, float]:
    """A model that computes something else may give no number at all, which is a difference more."""
    try:
        return measured(quality, model)
    except JointoptError as error:
        if not differences:
            raise
        differences.append(str(error))
        return {}


def _metric_differences(metrics: Mapping[str, float], record: Mapping[str, Any], allowed: Allowance) -> list[str]:
    found = []
    for name, value in metrics.items():
        recorded = record["metrics"].get(name)
        if recorded is not None and abs(value - recorded) > (most := allowed.metrics * max(1.0, abs(recorded))):
            found.append(f"{name}: {value:.6g} reloaded, {recorded:.6g} recorded (allowed {most:.3g} apart)")
    return found


def read_record(folder: str | Path) -> dict[str, Any]:
    """What was recorded at export."""
    check_kind("verify: folder", folder, (str, Path), "a path")
    path = Path(folder) / RECORD
    check_path(path, "verify")
    if not path.is_file():
        raise JointoptError(f"verify: {str(folder)!r} is no export: it has no {RECORD}")
    with reading(f"verify: {str(path)!r}", UNCHANGED):
        record = json.loads(path.read_text())
    keys = ("choices", "probe", "costs", "layers", "metrics")
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise JointoptError(f"verify: {str(path)!r} has no {', '.join(missing)}; allowed: {UNCHANGED}")
    if _target(record) not in TARGETS:
        raise JointoptError(f"verify: {str(path)!r}: target: found {_target(record)!r:.60}; allowed: {UNCHANGED}")
    return record


def _target(record: Mapping[str, Any]) -> Any:
    """The target's name, which records for transformers leave out."""
    return record.get("target", "transformers")


def _check_installed(folder: Path, record: Mapping[str, Any]) -> None:
    check_installed(TARGETS[_target(record)])
    wanted = next((layer["scheme"] for layer in record["layers"] if scheme(layer["scheme"]).bitsandbytes), None)
    if wanted and (told := lacking("bitsandbytes")):
        raise JointoptError(f"verify: {str(folder)!r} holds {wanted}; found {told}")


def _probe_differences(model: RemoteModel, record: Mapping[str, Any], allowed: Allowance) -> list[str]:
    if record["probe"] is None:
        return []
    with reading(f"verify: the probe in {RECORD}", UNCHANGED, RuntimeError):
        inputs = probe_inputs(record["probe"], model.dtype)
        expected = torch.tensor(record["probe"]["outputs"], dtype=torch.float32)
        largest = max(float(expected.abs().max()), float(record["probe"].get("largest", 0.0)))
    with torch.no_grad():
        found = probed(model(**inputs))
    most = allowed.outputs * largest + torch.finfo(torch.float32).eps
    if found.shape != expected.shape:
        return [f"outputs: {tuple(found.shape)} reloaded, {tuple(expected.shape)} recorded"]
    distances = (found - expected).abs()
    apart = float(distances.median() if allowed.by_median else distances.max())
    return [] if apart <= most else [f"outputs: {apart:.3g} apart from those recorded (allowed {most:.3g})"]


class ReloadError(Exception):
    """The other process could not load or run the model."""


class RemoteModel(nn.Module):
    """Stands for a model in another process: forward passes run there, its other methods are not to be had."""

    def __init__(self, folder: Path, pipe: Connection, end: Callable[[], None]):
        super().__init__()
        self._pipe, self._end = pipe, end
        with self._limited():
            head, _ = self._received()
        if head["imported"]:
            raise ReloadError(f"the fresh process imported {', '.join(head['imported'])}")
        self.placeholder = nn.Parameter(torch.empty(0, dtype=getattr(torch, head["dtype"])), requires_grad=False)
        try:
            config = json.loads((folder / "config.json").read_text())
        except DAMAGED as error:
            raise ReloadError(f"config.json cannot be read: {in_one_line(error)}") from None
        if "model_type" in config:
            from transformers import AutoConfig

            # An export's own file may hold its config's class; the other process ran that file already.
            self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)

    @property
    def device(self) -> torch.device:
        return self.placeholder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placeholder.dtype

    def forward(self, *arguments: Tensor, **inputs: Any) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in inputs.items() if name not in tensors and value is not None}
        head = {"names": list(tensors), "arguments": len(arguments), "values": values}
        positional = {f"argument{at}": tensor for at, tensor in enumerate(arguments)}
        sent = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in {**tensors, **positional}.items()}
        with self._limited():
            send(self._pipe, head, sent)
            answer, outputs = self._received()
        device = next((each.device for each in [*arguments, *tensors.values()]), self.device)
        found = [outputs[str(at)].to(device) for at in range(len(answer["keys"]))]
        if answer["keys"] == [None]:
            return found[0]
        return RemoteOutput(zip(answer["keys"], found, strict=True))

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Ends the other process where an exchange takes too long, by which whatever waits for it ends as well: one
        that stops half way through a message, too."""
        started, timer = time.monotonic(), threading.Timer(_SECONDS, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (EOFError, OSError):
            late = time.monotonic() - started >= _SECONDS
            told = f"no answer from the fresh process for {_SECONDS:.0f} s" if late else "the fresh process ended"
            raise ReloadError(told) from None
        finally:
            timer.cancel()

    def _received(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        head, tensors = receive(self._pipe)
        if "error" in head:
            raise ReloadError(" ".join(str(head["error"]).split())[:400])
        return head, tensors


class RemoteOutput(dict):
    """A model's output: by name, as attributes, or by position."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the output has {', '.join(map(str, self))}; not {name!r}")

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


@contextmanager
def reloaded(folder: str | Path, device: str = "cpu") -> Iterator[RemoteModel]:
    """The exported model in a fresh process, which ends with the block and finds packages where this one does; outputs
    are on the device of its inputs. What transformers copies of the folder's code goes where the block ends as well,
    not into the user's cache."""
    script = Path(__file__).with_name("reload.py")
    threads, (pipe, other) = str(torch.get_num_threads()), Pipe()
    command = [sys.executable, "-P", str(script), str(Path(folder).resolve()), threads, device, str(other.fileno())]
    with tempfile.TemporaryDirectory(prefix="jointopt-") as modules:
        with other:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env={**os.environ, "HF_MODULES_CACHE": modules},
            )
        try:
            yield RemoteModel(Path(folder), pipe, process.kill).eval()
        finally:
            process.kill()
            process.wait()
        pipe.close()
