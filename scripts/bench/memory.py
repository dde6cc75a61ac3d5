"""Peak memory of calibrating and finishing over that of the models themselves: random LLaMAs in bfloat16.

    python scripts/bench/memory.py [--case 135m] [--case 1.5b] [--rounding gptq] [--json FILE]

Resident memory is reset to now where a phase begins (Linux), so that each has a peak of its own. "models" are the
original, the super-network's copy, and, while finishing, the finished sub-network with its codes; "block" one block's
activations for all batches, "Hessian" that of the widest layer with what inverting it takes. 1.5b takes half an hour
on two cores; --blocks finishes the first of its blocks only, and leaves the others as they are.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from measures import Measures, command_line, resident
from networks import all_in
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.finishing.rounding import ROUNDINGS
from jointopt.rebuilding.structure import quantized_layers

CASES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1.5b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 49152},
}  # fmt: skip
LIMITS = {"135m": None, "1.5b": 20.0}
GB = 1e9


def begin() -> None:
    """Sets the peak of resident memory back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def random_llama(case: str) -> LlamaForCausalLM:
    """Random weights, made in bfloat16 at once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**CASES[case], tie_word_embeddings=True)).eval()
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--case", choices=tuple(CASES), action="append")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of each batch")
    parser.add_argument("--blocks", type=int, help="that are quantized and finished (default: all)")
    parser.add_argument("--rounding", choices=tuple(ROUNDINGS), default="gptq")
    options = parser.parse_args()
    measures = Measures(options.json)
    table = Table("case", "phase", "models (GB)", "peak (GB)", "beyond the models (GB)", "seconds")
    for case in options.case or ("135m",):
        torch.manual_seed(0)
        started = resident()
        model = random_llama(case)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        space = SearchSpace.for_model(model, preset="fixed", schemes=["none", "W4A16"])
        supernet = Supernet(model, space)
        seen = [
            {"input_ids": torch.randint(0, model.config.vocab_size, (1, options.tokens))}
            for _ in range(options.batches)
        ]
        blocks = options.blocks or model.config.num_hidden_layers
        genome = all_in(space, "W4A16", [f"block{at}" for at in range(blocks)])
        for phase in ("calibrate", options.rounding):
            begin()
            clock = time.perf_counter()
            if phase == "calibrate":
                supernet.calibrate(seen)
                models = 2 * weights
            else:
                finished = jointopt.finish(supernet, genome, seen, options.rounding)
                codes = sum(layer.quantized.codes.nbytes for layer in quantized_layers(finished.model).values())
                models = 2 * weights + codes + sum(each.nbytes for each in finished.model.parameters())
            seconds, peak = time.perf_counter() - clock, resident("VmHWM") - started
            label = f"{case}, {blocks} of {model.config.num_hidden_layers} blocks, {options.batches} x {options.tokens}"
            table.add_row(
                label, phase, f"{models / GB:.2f}", f"{peak / GB:.2f}", f"{(peak - models) / GB:.2f}", f"{seconds:.0f}"
            )
            measures.tell(f"{label}, {phase}", "peak GB", peak / GB, LIMITS[case], "lower")
            measures.tell(f"{label}, {phase}", "GB beyond the models", (peak - models) / GB, None, "lower")
        del model, supernet, finished
    Console().print(table)


if __name__ == "__main__":
    main()
