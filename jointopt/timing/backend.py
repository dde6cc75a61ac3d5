"""What computes networks on this machine: ONNX Runtime on its CPU, or torch on its CPU or GPU."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from jointopt.checkpoint.onnx.session import saturates
from jointopt.cost.operators import Operator
from jointopt.names import MOST
from jointopt.targets import TARGETS, check_schemes
from quant.errors import JointoptError, check_choice, check_count
from quant.formats import Scheme, dtype_name

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

ONNXRUNTIME, TORCH = "onnxruntime", "torch"


def host() -> str:
    """This machine, whatever computes on it."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the platform module's name it is
    return f"{model}, {os.cpu_count()} cores"


@dataclass(frozen=True)
class Backend:
    """A library on one of this machine's processors.

    torch has no kernels for quantized products: a checkpoint's weights are unpacked once, and each layer then computes
    as an unquantized one does, but for what compressed-tensors' forward adds to it, which is fitted end to end
    (`Lookup.fit`). Formats that round inputs take time beside that, which depends on what loads them.

    Attributes:
        name: "onnxruntime", which computes in float32 on the CPU, or "torch".
        threads: of the CPU.
        device, dtype: of torch.
    """

    name: str = ONNXRUNTIME
    threads: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, supernet: Supernet, name: str, threads: int) -> Backend:
        """Where a super-network's exports run.

        Raises:
            JointoptError: an unknown name, threads that are no number from 1, a number format that has no form in ONNX
                Runtime; for torch, a space with formats that round inputs, bitsandbytes' formats or quantized caches.
        """
        check_count("threads", threads, MOST["threads"])
        if name == ONNXRUNTIME:
            check_schemes(TARGETS[ONNXRUNTIME], sorted({each.name for each in supernet.schemes.values()}))
            return cls(threads=threads)
        check_choice("backend", name, (ONNXRUNTIME, TORCH))
        choices = {gene.name: gene.choices for gene in supernet.space.genes}
        cached = next((each.name for each in supernet.family.caches if {*choices.get(each.name, ())} - {"none"}), None)
        if cached is not None:
            raise JointoptError(f"{cached}: quantized caches are not timed in torch; allowed: none")
        for (path, _), scheme in supernet.schemes.items():
            _check_timed(scheme, isinstance(supernet.model.get_submodule(path), nn.Embedding))
        return cls(name, threads, str(supernet.device), next(supernet.model.parameters()).dtype)

    @property
    def machine(self) -> str:
        """This machine, as far as its times depend on it: processor, cores, library, threads."""
        if self.name == ONNXRUNTIME:
            sums = ", told to be exact" if saturates() else ""
            return f"{host()}, ONNX Runtime {version('onnxruntime')}{sums}, {self.threads} threads"
        library = f"torch {version('torch')} {dtype_name(self.dtype)}"
        on = f"on {torch.cuda.get_device_name(self.device)}" if self.on_gpu else f"{self.threads} threads"
        return f"{host()}, {library}, {on}"

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def memory(self) -> float:
        """Bytes that the device has."""
        if self.on_gpu:
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def computed(self, operator: Operator) -> Operator:
        """The operator as it is computed: in torch unquantized, whatever format its weights have."""
        if self.name == ONNXRUNTIME:
            return operator
        return replace(operator, scheme=None, reader=None, bits=self.dtype.itemsize * 8)


def _check_timed(scheme: Scheme, embedding: bool) -> None:
    """Raises JointoptError for a format that torch's time of the unquantized layer says nothing about."""
    if scheme.bitsandbytes is not None:
        raise JointoptError(
            f"{scheme.name}: bitsandbytes' kernels are not timed; allowed: none, and other formats of weights alone"
        )
    if scheme.activations is not None and not embedding:
        raise JointoptError(
            f"{scheme.name}: rounds a layer's inputs, for which torch has no kernel to be timed; allowed: none and "
            "formats of weights alone, such as W4A16"
        )
