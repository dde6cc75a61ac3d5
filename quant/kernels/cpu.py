"""The CPU's kernels: `cpu.cpp`, compiled by the machine's own compiler the first time that it is needed.

Compiling takes some seconds, once for a machine: what comes of it stays in ~/.cache/jointopt (or below
$XDG_CACHE_HOME), named by the source, the compiler's version and the processor's instruction set, and every other
process loads it in a millisecond. Without a compiler plain torch computes the same bits, and a warning says so.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quant.formats import Format
from quant.kernels.grouped import Job, job_of

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
INSTRUCTIONS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}
_GRAIN = 32768
"""Elements from which on a second thread is worth its start (torch's own figure)."""
_ANY = Format("int8", "channel")


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "size")),
        *((name, ctypes.c_int32) for name in ("kind", "scale", "type", "steps_in_type", "quotient_type")),
        *((name, ctypes.c_int32) for name in ("mantissa", "exponent_min", "exponent_max")),
        *((name, ctypes.c_float) for name in ("low", "high", "half", "never_zero", "reach", "zero")),
        ("threads", ctypes.c_int32),
    ]


class _Places(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("x", "low", "high", "global_scale", "values", "codes", "scales", "zero_points")
    ]


def compiler() -> list[str]:
    """The command that compiles: $CXX, which may have arguments, or c++."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, after one warning, where they cannot be compiled."""
    try:
        return _loaded(_compiled())
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in said.splitlines() if "error" in line), said.splitlines()[0] if said else "")
        warnings.warn(
            f"quant: {shlex.join(compiler())!r} made no kernels ({reason}); plain torch rounds instead, some 5 times "
            "slower. A C++ compiler with _Float16 mends that (GCC 12, Clang 15; $CXX names another)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _loaded(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.convert_groups.argtypes = (ctypes.POINTER(_Job), ctypes.POINTER(_Places))
    found.convert_groups.restype = ctypes.c_uint32
    found.largest_magnitude.argtypes = (ctypes.POINTER(_Job), ctypes.c_void_p)
    found.largest_magnitude.restype = ctypes.c_uint32
    return found


def _compiled() -> Path:
    """Where the compiled library is, after it has been made if need be: whole or not at all, whoever else makes it."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    flags = (*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    if sys.platform == "linux":
        flags = (*flags, "-fopenmp")  # torch has loaded the same runtime already, with its number of threads
    named = hashlib.sha256(repr((SOURCE.read_text(), version, flags, platform.machine())).encode()).hexdigest()[:16]
    folder = _folder()
    path = folder / f"quant-{named}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / path.name
            command = [*compiler(), *flags, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            made.replace(path)
    return path


def cache_folder() -> Path:
    """Where what is made once for a machine stays. Raises RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jointopt"


def _folder() -> Path:
    """Where compiled libraries stay; where nothing can be written there, a folder that goes with this process."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        pass
    own = tempfile.mkdtemp(prefix="jointopt-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)


def convert(job: Job, x: Tensor, groups: int, places: Mapping[str, Tensor | None]) -> int:
    """`KernelBackend.convert`, where `library()` is there."""
    at = _Places(x.data_ptr(), **{name: None if each is None else each.data_ptr() for name, each in places.items()})
    return _kernels().convert_groups(_sized(job, x, groups), at)


def largest(x: Tensor) -> int:
    return _kernels().largest_magnitude(_sized(job_of(_ANY, x.dtype, True), x, 1), x.data_ptr())


def _kernels() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def _sized(job: Job, x: Tensor, groups: int) -> _Job:
    mine = _Job.from_buffer_copy(_template(job))
    mine.groups, mine.size = groups, x.numel() // groups
    mine.threads = torch.get_num_threads() if x.numel() > _GRAIN else 1
    return mine


@cache
def _template(job: Job) -> _Job:
    names = [name for name, *_ in _Job._fields_ if name not in ("groups", "size", "threads", "zero")]
    return _Job(zero=0.0 if job.weight else -0.0, **{name: getattr(job, name) for name in names})
