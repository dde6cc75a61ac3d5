"""What a quantized cache costs in quality, and saves in bytes: SmolLM2-135M, all layers in one format.

    python scripts/assets.py assets smollm2 text
    python scripts/bench/caches.py --assets assets --json caches.json

Ranges of keys come from one text, perplexity and divergence from another. Weights stay as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jointopt import SearchSpace, Supernet
from jointopt.evaluation import measured
from jointopt.models import load_model
from jointopt.rows import DataSource
from jointopt.tasks import TASKS
from quant import CACHE_FORMATS
from search_spaces.precision import is_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pieces", type=int, default=8, help="of 512 tokens, to score on")
    arguments = parser.parse_args()
    loaded = load_model(str(arguments.assets / "smollm2"), "causal-lm", device="cpu", dtype="float32")
    task, text = TASKS["causal-lm"], arguments.assets / "text"

    def batches(name: str, samples: int) -> list:
        source = DataSource(str(text / name), samples=samples, length=512)
        return task.batches(source, loaded.processor, loaded.model, 2)

    quality = task.problem(loaded.model).quality(batches("evaluate.txt", arguments.pieces), loaded.model)
    supernet = Supernet(
        loaded.model, SearchSpace.for_model(loaded.model, preset="fixed", schemes=["none"], caches=list(CACHE_FORMATS))
    )
    supernet.calibrate([{"input_ids": batch["input_ids"]} for batch in batches("calibrate.txt", 8)])
    rows = []
    for choice, form in enumerate(CACHE_FORMATS.values()):
        genome = supernet.space.largest
        genome[[is_cache(name) for name in supernet.space.names]] = choice
        with supernet.active(genome) as model:
            found = {**measured(quality, model), **supernet.costs(genome)}
        for measure in ("perplexity", "kl", "cache", "decode_macs"):
            row = {"case": form.name, "measure": measure, "value": found[measure], "aim": None, "better": "lower"}
            rows.append(row)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def show(rows: list[dict]) -> None:
    table = Table("cache", "perplexity", "KL to the original", "kB a token", "million MACs of one more token")
    for at in range(0, len(rows), 4):
        perplexity, divergence, cache, macs = (row["value"] for row in rows[at : at + 4])
        table.add_row(
            rows[at]["case"], f"{perplexity:.3f}", f"{divergence:.4f}", f"{cache / 1e3:.2f}", f"{macs / 1e6:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
