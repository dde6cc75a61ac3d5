"""Our roofline beside GenZ's, and a cost front of LLaMA-3-70B from shapes alone.

    python scripts/bench/roofline.py --json roofline.json

GenZ's figures (arXiv 2406.01698) are what its package genz-llm 0.0.16 gives for the same models, batches, contexts and
tensor parallelism, in bfloat16, one beam, with the rates that it lists for the A100 80GB and the H100. It has no time
for starting a kernel and half of the A100's NVLink, and so has ours here. No weight is loaded: the models are on
torch's meta device.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from measures import Measures, command_line
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from jointopt import Roofline, SearchSpace, Supernet, load_device
from jointopt.objectives import non_dominated

GENZ = {
    # model, devices, device, batch, context: milliseconds of the prefill, and of one more token.
    ("llama2-7b", 1, "a100", 1, 512): (22.555, 6.159),
    ("llama2-7b", 1, "a100", 1, 2048): (95.508, 6.527),
    ("llama2-7b", 1, "a100", 8, 1024): (367.936, 8.003),
    ("llama2-7b", 1, "a100", 16, 1024): (735.871, 9.971),
    ("llama2-7b", 1, "h100", 1, 512): (7.179, 3.694),
    ("llama2-7b", 1, "h100", 1, 2048): (30.13, 3.915),
    ("llama2-7b", 1, "h100", 8, 1024): (116.073, 4.801),
    ("llama2-7b", 1, "h100", 16, 1024): (232.145, 5.983),
    ("llama2-70b", 4, "a100", 1, 2048): (287.893, 17.563),
    ("llama2-70b", 4, "a100", 32, 2048): (9157.414, 20.74),
    ("llama2-70b", 4, "h100", 1, 2048): (92.949, 11.234),
    ("llama2-70b", 4, "h100", 32, 2048): (2919.217, 12.949),
    ("llama2-70b", 8, "a100", 1, 2048): (180.076, 10.966),
    ("llama2-70b", 8, "a100", 32, 2048): (5667.243, 13.07),
    ("llama2-70b", 8, "h100", 1, 2048): (59.972, 7.791),
    ("llama2-70b", 8, "h100", 32, 2048): (1823.908, 8.823),
}
LINKS = {"a100": 1.5e11, "h100": 4.5e11}
"""Bytes a second from one device to the others, as GenZ lists them."""
SIZES = {
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000),
    "llama3-70b": (8192, 28672, 80, 64, 8, 128256),
}


def llama(name: str) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, groups, words = SIZES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def compared(console: Console, measures: Measures) -> None:
    table = Table("model", "devices", "batch", "context", "prefill ms", "GenZ", "one token ms", "GenZ")
    models = {name: llama(name) for name in ("llama2-7b", "llama2-70b")}
    for (name, parallel, device, batch, context), (prefill, token) in GENZ.items():
        model = models[name]
        space = SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed")
        known = load_device(device)
        network = known.network.model_copy(update={"bandwidth": LINKS[device]})
        bare = known.model_copy(update={"overhead": 0.0, "network": network})
        roofline = Roofline(bare, batch, context, parallel)
        costs = Supernet(model, space, latency=roofline).original_costs()
        ours = (costs["latency"] * 1e3, costs["decode_latency"] * 1e3)
        case = f"{name}, {parallel} x {device}, batch {batch}, context {context}"
        for measure, value, expected in zip(("prefill", "one token"), ours, (prefill, token), strict=True):
            off = abs(value / expected - 1)
            measures.keep(case, f"{measure}, off", off, 0.15, "lower")
        cells = [name, f"{parallel} x {device}", str(batch), str(context)]
        table.add_row(*cells, f"{ours[0]:.4g}", f"{prefill:.4g}", f"{ours[1]:.4g}", f"{token:.4g}")
    console.print(table)
    console.print(f"at most {max(row['value'] for row in measures.rows):.1%} off", highlight=False)


def front(console: Console, measures: Measures, genomes: int = 10_000) -> None:
    """Size against prefill of random sub-networks of LLaMA-3-70B on eight H100."""
    model = llama("llama3-70b")
    started = time.perf_counter()
    space = SearchSpace.for_model(
        model, schemes=["none", "W8A8", "FP8_DYNAMIC", "W4A16"], depth=[0.75, 0.85, 1.0], mlp=[0.5, 0.75, 1.0]
    )
    supernet = Supernet(model, space, latency=Roofline(load_device("h100"), 8, 2048, 8))
    supernet.costs(space.largest)
    made = time.perf_counter() - started
    started = time.perf_counter()
    columns = supernet.cost_columns(space.sample(genomes, seed=0))
    kept = non_dominated(np.stack([columns["size"], columns["latency"]], axis=1))
    seconds = time.perf_counter() - started
    console.print(
        f"LLaMA-3-70B on 8 x H100: {genomes:,} genomes of {len(space)} genes in {seconds:.1f} s, {int(kept.sum())} of "
        f"them on the front; the tables were made in {made:.1f} s",
        highlight=False,
    )
    for measure, value in ((f"{genomes} genomes, seconds", seconds), ("with the tables, seconds", seconds + made)):
        measures.keep("llama3-70b, 8 x h100", measure, value, 10, "lower")


def main() -> None:
    parser = command_line(__doc__)
    arguments = parser.parse_args()
    console, measures = Console(), Measures(arguments.json)
    compared(console, measures)
    front(console, measures)


if __name__ == "__main__":
    main()
