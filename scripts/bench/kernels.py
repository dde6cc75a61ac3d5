"""Fake quantization of one tensor: our kernels, the reference, torchao and compressed-tensors on the same input.

    python scripts/bench/kernels.py --json kernels.json

Every format and granularity on inputs of three shapes (a ViT's, a BERT's, a LLaMA's), float32, scales computed from
the input but for static formats. All that is compared takes turns with a copy of the tensor (`clone`), so that a slow
minute of the machine falls on all; figures are medians of the ratios to the copy beside it. Everything is as its
library gives it: nobody's code is compiled by `torch.compile`. "-" is a format that the library has not.

torchao and compressed-tensors run what their fake quantization is on a CPU: torchao's affine primitives for integers
and FP8, its MXTensor and NVFP4Tensor, there and back; compressed-tensors' `fake_quantize`. At the end is what compiling
our kernels takes a machine once, and a process that finds them compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from statistics import median

import torch
from measures import Measures, command_line, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from quant import kernels, reference
from quant.formats import Format

# transformers looks for a package of this file's name, and in whatever runs in this folder it imports this one. So this
# has a version that is too old to be used, and imports what imports transformers only where that is called.
__version__ = "0"

SHAPES = ((8, 197, 192), (32, 128, 384), (512, 1536))
AIM = 1.2

_GRANULARITIES = (("tensor", None), ("token", None), ("group", 32), ("group", 128))
FORMATS = {
    "int8": ("int8", True),
    "int8 zero point": ("int8", False),
    "int4": ("int4", True),
    "int4 zero point": ("int4", False),
    "fp8_e4m3": ("fp8_e4m3", True),
    "fp8_e5m2": ("fp8_e5m2", True),
    "fp4_e2m1": ("fp4_e2m1", True),
}
BLOCKS = {
    "mxfp4": Format("fp4_e2m1", "group", 32, scale="e8m0", dynamic=True),
    "nvfp4": Format("fp4_e2m1", "group", 16, scale="e4m3", dynamic=True),
}
STATIC_SCALE = torch.tensor([0.03]).bfloat16()

Run = Callable[[], object]


def cases() -> dict[str, Format]:
    found = {
        f"{name}, {granularity}{f' of {group}' if group else ''}": Format(
            element, granularity, group, symmetric, dynamic=True
        )
        for name, (element, symmetric) in FORMATS.items()
        for granularity, group in _GRANULARITIES
    }
    static = {f"{name}, static": Format(name, "tensor") for name in ("int8", "fp8_e4m3")}
    return found | static | {f"{name}, group of {form.group_size}": form for name, form in BLOCKS.items()}


def divides(x: Tensor, format: Format) -> bool:
    return format.group_size is None or x.shape[-1] % format.group_size == 0


def constants(x: Tensor, format: Format) -> dict[str, Tensor]:
    if format.scale == "e4m3":
        return {"global_scale": reference.global_scale_of(x.abs().amax())}
    return {} if format.dynamic else {"scale": STATIC_SCALE}


def compressed_tensors(x: Tensor, format: Format) -> Run | None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    kind = format.kind
    if kind.is_float and format.element == "fp8_e5m2":
        return None
    strategy = "tensor_group" if format.scale == "e4m3" else format.granularity
    arguments = QuantizationArgs(
        num_bits=kind.bits,
        type="float" if kind.is_float else "int",
        strategy=strategy,
        group_size=format.group_size,
        symmetric=format.symmetric,
        dynamic="local" if format.scale == "e4m3" else format.dynamic,
        scale_dtype=torch.uint8 if format.scale == "e8m0" else None,
    )
    whole, module = constants(x, format).get("global_scale"), nn.Module()
    if not format.dynamic:
        scale = STATIC_SCALE.float()
        return lambda: fake_quantize(x, scale, None, arguments)

    def run() -> Tensor:
        scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, module, whole)
        return fake_quantize(x, scale, zero_point, arguments, whole)

    return run


def torchao(x: Tensor, format: Format) -> Run | None:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import quant_primitives as ao

    if format.scale == "e8m0":
        return lambda: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    if format.scale == "e4m3":
        whole = 1 / constants(x, format)["global_scale"]
        return lambda: NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=whole).dequantize(torch.float32)
    last = x.shape[-1] if format.group_size is None else format.group_size
    block = tuple(x.shape) if format.granularity == "tensor" else (*[1] * (x.dim() - 1), last)
    scale, kind = STATIC_SCALE.float(), format.kind
    if kind.is_float:
        if kind.dtype is None:
            return None

        def run() -> Tensor:
            own = ao._choose_scale_float8(x, list(block), kind.dtype) if format.dynamic else scale
            return ao._dequantize_affine_float8(ao._quantize_affine_float8(x, own, kind.dtype), own)

        return run
    mapping = ao.MappingType.SYMMETRIC if format.symmetric else ao.MappingType.ASYMMETRIC
    least, most = int(kind.min), int(kind.max)

    def rounded() -> Tensor:
        own, point = scale, torch.zeros(1, dtype=torch.int32)
        if format.dynamic:
            own, point = ao.choose_qparams_affine(x, mapping, block, torch.int8, least, most)
        return ao._fake_quantize_affine(x, block, own, point, torch.int8, least, most)

    return rounded


def contenders(x: Tensor, format: Format) -> dict[str, Run]:
    given = constants(x, format)
    found: dict[str, Run | None] = {
        "ours": lambda: kernels.fake_quantize_activation(x, format, **given),
        "reference": lambda: reference.fake_quantize_activation(x, format, **given),
        "torchao": torchao(x, format),
        "compressed-tensors": compressed_tensors(x, format),
    }
    return {name: run for name, run in found.items() if run is not None}


@torch.no_grad()
def ratios(x: Tensor, format: Format, repeats: int) -> dict[str, float]:
    """Time over that of a copy, by contender."""
    runs = contenders(x, format)
    for name, run in list(runs.items()):
        try:
            run()
        except Exception as error:
            print(f"{name} {named(x)} {format}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
            del runs[name]
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in runs if turn % 2 else reversed(runs):
            inner = 3 if name == "ours" else 1
            for _ in range(inner):
                copy = seconds(x.clone)
                taken[name].append(seconds(runs[name]) / copy)
    return {name: median(times) for name, times in taken.items()}


def named(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def compiling() -> list[tuple[str, float]]:
    """Seconds until the kernels are there, in a process that compiles them and in the next."""
    with tempfile.TemporaryDirectory() as empty:
        check = "import time; from quant.kernels import cpu; t = time.perf_counter(); "
        check += "assert cpu.library() is not None; print(time.perf_counter() - t)"
        environment = {**os.environ, "XDG_CACHE_HOME": empty}
        command = [sys.executable, "-c", check]
        taken = [float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout) for _ in "12"]
    return [("compiling, once for a machine (s)", taken[0]), ("loading in the next process (s)", taken[1])]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    names = ("ours", "reference", "torchao", "compressed-tensors")
    table = Table("format", "shape", *names, title=f"time / copy, {torch.get_num_threads()} threads, float32")
    measures, missed, slower = Measures(arguments.json), [], []
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for case, format in cases().items():
            if not divides(x, format):
                continue
            found = ratios(x, format, arguments.repeats)
            what = f"{case}, {named(x)}"
            table.add_row(case, named(x), *(f"{found[name]:.2f}" if name in found else "-" for name in names))
            for name, value in found.items():
                aim = AIM if name == "ours" else None
                measures.keep(what, f"{name} / copy", value, aim, "lower")
            if found["ours"] > AIM:
                missed.append(f"{what}: {found['ours']:.2f}")
            slower += [f"{what}: {name}" for name in names[1:] if found.get(name, 1e9) <= found["ours"]]
        table.add_section()
    Console(width=110).print(table)
    for measure, value in compiling():
        measures.tell("kernels", measure, value, None, "lower")
    print(f"beyond {AIM} of a copy: {len(missed)}", *missed, sep="\n  ")
    print(f"slower than a neighbour: {len(slower)}", *slower, sep="\n  ")


if __name__ == "__main__":
    main()
