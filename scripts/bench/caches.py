"""What a quantized cache costs in quality, and saves in bytes: SmolLM2-135M, all layers in one format.

    python scripts/assets.py assets smollm2 text
    python scripts/bench/caches.py --assets assets --json caches.json

Ranges of keys come from one text, perplexity and divergence from another. Weights stay as they are.
"""

from __future__ import annotations

from loading import Loaded
from measures import Measures, command_line
from rich.console import Console
from rich.table import Table

from jointopt import SearchSpace, Supernet
from jointopt.evaluation.evaluation import measured
from jointopt.rows import DataSource
from quant.cache import CACHE_FORMATS
from search_spaces.precision import is_cache


def main() -> None:
    parser = command_line(__doc__, assets=True)
    parser.add_argument("--pieces", type=int, default=8, help="of 512 tokens, to score on")
    arguments = parser.parse_args()
    loaded, text = Loaded(arguments.assets / "smollm2", "causal-lm"), arguments.assets / "text"
    scored = DataSource(str(text / "evaluate.txt"), samples=arguments.pieces, length=512)
    quality = loaded.quality(loaded.batches(scored, 2), loaded.model)
    supernet = Supernet(
        loaded.model, SearchSpace.for_model(loaded.model, preset="fixed", schemes=["none"], caches=list(CACHE_FORMATS))
    )
    supernet.calibrate(loaded.inputs(DataSource(str(text / "calibrate.txt"), samples=8, length=512), 2))
    measures = Measures(arguments.json)
    table = Table("cache", "perplexity", "KL to the original", "kB a token", "million MACs of one more token")
    for choice, form in enumerate(CACHE_FORMATS.values()):
        genome = supernet.space.largest
        genome[[is_cache(name) for name in supernet.space.names]] = choice
        with supernet.active(genome) as model:
            found = {**measured(quality, model), **supernet.costs(genome)}
        for measure in ("perplexity", "kl", "cache", "decode_macs"):
            measures.tell(form.name, measure, found[measure], None, "lower")
        cost = (f"{found['cache'] / 1e3:.2f}", f"{found['decode_macs'] / 1e6:.0f}")
        table.add_row(form.name, f"{found['perplexity']:.3f}", f"{found['kl']:.4f}", *cost)
    Console().print(table)


if __name__ == "__main__":
    main()
