"""How far rounding to nearest may stand in for GPTQ while searching: rank correlation of their scores over genomes.

    python scripts/assets.py assets digits minilm movies smollm2 text
    python scripts/bench/standin.py --assets assets --case digits_vit [--genomes 40] [--json FILE]

Each genome is scored as the search scores it, and finished and scored again: KL divergence to the whole, unquantized
model, on batches that neither saw. "formats" draws number formats alone, at the full architecture; "all" all genes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from measures import Measures, command_line
from networks import Ready, networks, prepare
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.evaluation.evaluation import measured
from search_spaces.precision import is_precision

SCHEMES = ("W8A8", "W4A16", "NVFP4", "MXFP4", "W4A8", "FP8_DYNAMIC")


def ready(name: str, assets: Path, work: Path) -> Ready:
    """A super-network over the schemes whose rounding matters."""
    found = prepare(name, assets, work)
    space = SearchSpace.for_model(found.supernet.model, schemes=SCHEMES, **networks(assets)[name].space)
    supernet = Supernet(found.supernet.model, space)
    supernet.weights_changed()  # its channels are sorted already
    supernet.calibrate(found.inputs)
    return replace(found, supernet=supernet)


def genomes(space: SearchSpace, count: int, formats_only: bool) -> list[np.ndarray]:
    found = []
    for genome in space.sample(count, seed=0):
        if formats_only:
            drawn, whole = space.decode(genome), space.decode(space.largest)
            drawn = {k: (drawn[k] if is_precision(k) else v) for k, v in whole.items()}
            genome = space.encode(drawn)
        found.append(space.canonical(genome))
    return found


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/networks")
    parser.add_argument("--case", choices=("digits_vit", "digits_resnet", "minilm", "smollm2"), action="append")
    parser.add_argument("--genomes", type=int, default=40)
    options = parser.parse_args()
    measures, table = (
        Measures(options.json),
        Table(title=f"KL to the original, rounded to nearest and by GPTQ, {options.genomes} genomes"),
    )
    for text in ("case", "genes", "rank correlation", "median nearest", "median GPTQ", "better by GPTQ"):
        table.add_column(text, justify="right")
    for name in options.case or ("digits_vit", "digits_resnet", "minilm"):
        given = ready(name, options.assets, options.work)
        for kind in ("formats", "all"):
            near, fine = [], []
            for genome in track(genomes(given.supernet.space, options.genomes, kind == "formats"), f"{name} {kind}"):
                with given.supernet.active(genome) as view:
                    near.append(measured(given.quality, view)["kl"])
                finished = jointopt.finish(given.supernet, genome, given.inputs, quality=given.quality)
                assert finished.metrics is not None
                fine.append(finished.metrics["kl"])
            rank = float(spearmanr(near, fine).statistic)
            better = float(np.mean(np.array(fine) < near))
            table.add_row(
                name, kind, f"{rank:.3f}", f"{np.median(near):.4g}", f"{np.median(fine):.4g}", f"{better:.0%}"
            )
            case = f"{name}, {kind}, {options.genomes} genomes"
            measures.tell(case, "rank correlation", rank, None, "higher")
            measures.tell(case, "better by GPTQ", better, None, "higher")
    Console().print(table)


if __name__ == "__main__":
    main()
