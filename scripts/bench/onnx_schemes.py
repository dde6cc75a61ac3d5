"""What ONNX Runtime does with each number format that exports for it may have: speed, and memory once loaded.

    python scripts/bench/onnx_schemes.py --json onnx_schemes.json

A linear layer of 1024 x 1024 at 1, 16 and 256 rows, on one thread: time as a ratio to float32, all formats in turns,
medians. Memory is what a process grows by when it loads a layer of 4096 x 4096, as a ratio to its float32 weights: a
format that is dequantized when it is loaded takes 1 or more.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from measures import Measures, command_line, resident
from rich.console import Console
from rich.table import Table

from jointopt.cost.operators import Operator
from jointopt.targets import TARGETS
from jointopt.timing.backend import Backend
from jointopt.timing.timers import time_operators
from quant.formats import scheme

WIDE = 4096


def layer(name: str, width: int, rows: int) -> Operator:
    wanted = scheme(name)
    return Operator("linear", width, width, rows, scheme=wanted.fitted([width]) if wanted.weights else None)


def grown(name: str) -> float:
    """Bytes that a fresh process grows by when it loads the layer, over those of its float32 weights."""
    folder = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {folder!r}); import onnx_schemes; print(onnx_schemes.loaded({name!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def loaded(name: str) -> float:
    import gc
    import tempfile

    import onnxruntime
    import torch

    from jointopt.checkpoint.onnx.graph import traced, with_twins
    from jointopt.timing.timers import module_of

    module, inputs = module_of(layer(name, WIDE, 1), 1)
    with tempfile.TemporaryDirectory() as place:
        holder = torch.nn.Sequential(module)
        program = traced(with_twins(holder), inputs)
        path = f"{place}/model.onnx"
        program.save(path)
        del program, holder, module
        gc.collect()
        before = resident()
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        session.run(None, {session.get_inputs()[0].name: inputs[0].numpy()})
        return (resident() - before) / (4 * WIDE * WIDE)


def main() -> None:
    parser = command_line(__doc__)
    arguments = parser.parse_args()
    measures = Measures(arguments.json)
    names = TARGETS["onnxruntime"].schemes
    layers = {count: [layer(name, 1024, count) for name in names] for count in (1, 16, 256)}
    times = {count: time_operators(each, 1, Backend()) for count, each in layers.items()}
    table = Table("scheme", "1 row", "16 rows", "256 rows", "memory")
    for at, name in enumerate(names):
        ratios = {count: times[count][at] / times[count][0] for count in times}
        memory = grown(name)
        table.add_row(name, *(f"{each:.2f}" for each in ratios.values()), f"{memory:.2f}")
        for count, value in ratios.items():
            measures.tell(name, f"time, {count} rows", value, None, "lower")
        measures.tell(name, "memory", memory, None, "lower")
    Console().print(table)


if __name__ == "__main__":
    main()
