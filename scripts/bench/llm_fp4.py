"""LLM-FP4 on SmolLM2-135M, W4A4: plain E2M1, searched formats (the paper's FPQ baseline), and pre-shifted biases (FPQ).

    python scripts/assets.py assets smollm2 text
    python scripts/bench/llm_fp4.py --assets assets [--ratios 100 --rounds 3 --tokens 256] [--json FILE]

All linear layers of the blocks, weights with a scale an output channel, activations static with one for all; formats
are searched on inputs of the unquantized model from one text and scored on another. "Won back" is the share of plain
E2M1's loss in nats over the unquantized model's. The model's weights were 4-bit integers once, so that its weights'
errors are not those of other models; its activations' are.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from loading import Loaded
from measures import Measures, command_line
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from jointopt.evaluation.evaluation import measured
from jointopt.rows import DataSource
from quant.llm_fp4 import E2M1, SEARCHED, LayerFormats, plain, search

VARIANTS = ("E2M1, plain", "FPQ baseline", "FPQ, pre-shifted", "FPQ, pre-shifted, E2M1 alone")


class Held(nn.Module):
    """A linear layer in formats that were found for it."""

    def __init__(self, layer: nn.Linear, found: LayerFormats):
        super().__init__()
        self.found, self.weight, self.bias = found, found.held_weight(layer.weight.detach()), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.found.held_input(x), self.weight, self.bias)


def seen_inputs(model: nn.Module, batches: list[Any], tokens: int) -> dict[str, Tensor]:
    """Path of each linear layer in a block -> some of its inputs, [tokens, columns], evenly drawn."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].flatten(0, -2)
            found.setdefault(path, []).append(x[:: max(1, len(batches) * len(x) // tokens)].clone())

        return hook

    paths = [path for path, each in model.named_modules() if isinstance(each, nn.Linear) and ".layers." in path]
    hooks = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


def formats(variant: str, weight: Tensor, x: Tensor, ratios: list[float], rounds: int) -> LayerFormats:
    if variant == "E2M1, plain":
        return plain(weight, x)
    elements = (E2M1,) if "alone" in variant else SEARCHED
    return search(weight, x, "pre-shifted" in variant, elements, rounds, ratios)


def main() -> None:
    parser = command_line(__doc__, assets=True)
    parser.add_argument("--ratios", type=int, default=100, help="clipping ranges tried, up to 1.2 of the largest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="inputs of each layer that are searched on")
    parser.add_argument("--pieces", type=int, default=8, help="of 256 tokens, to score on")
    parser.add_argument("--blocks", type=int, help="that are quantized, evenly spread over the model (default: all)")
    options = parser.parse_args()
    loaded, text = Loaded(options.assets / "smollm2", "causal-lm"), options.assets / "text"
    model = loaded.model
    inputs = loaded.inputs(DataSource(str(text / "calibrate.txt"), samples=32, length=256), 2)
    seen = seen_inputs(model, inputs, options.tokens)
    scored = DataSource(str(text / "evaluate.txt"), samples=options.pieces, length=256)
    quality = loaded.quality(loaded.batches(scored, 2), model)
    count = model.config.num_hidden_layers
    kept = set(torch.linspace(0, count - 1, options.blocks or count).round().int().tolist())
    layers = {path: model.get_submodule(path) for path in seen if int(path.split(".layers.")[1].split(".")[0]) in kept}
    ratios = torch.linspace(1.2 / options.ratios, 1.2, options.ratios).tolist()
    losses, measures = {"unquantized": measured(quality, model)["loss"]}, Measures(options.json)
    table = Table("W4A4", "perplexity", "won back", "seconds", "layers with a home in an export")
    table.add_row("unquantized", f"{measured(quality, model)['perplexity']:.2f}", "100%", "", "")
    for variant in VARIANTS:
        started, homes = time.perf_counter(), 0
        for path, layer in track(layers.items(), variant):
            found = formats(variant, layer.weight.detach(), seen[path], ratios, options.rounds)
            model.set_submodule(path, Held(layer, found))
            homes += found.has_home
        scored, seconds = measured(quality, model), time.perf_counter() - started
        losses[variant] = scored["loss"]
        first = losses["E2M1, plain"]
        won = (first - scored["loss"]) / (first - losses["unquantized"])
        table.add_row(variant, f"{scored['perplexity']:.2f}", f"{won:.1%}", f"{seconds:.0f}", f"{homes}/{len(layers)}")
        case = f"SmolLM2-135M, {len(kept)} of {count} blocks in W4A4, {variant}"
        measures.tell(case, "perplexity", scored["perplexity"], None, "lower")
        measures.tell(case, "won back", won, None, "higher")
        for path, layer in layers.items():
            model.set_submodule(path, layer)
    Console().print(table)


if __name__ == "__main__":
    main()
