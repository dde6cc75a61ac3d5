"""What least-squares repair of narrowed layers is worth before any training, on fine-tuned models.

    python scripts/assets.py assets digits minilm movies smollm2 text
    python scripts/bench/repair.py --assets assets --json repair.json

Sub-networks of all blocks, unquantized, each width drawn from its choices: the same with and without. Medians.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from measures import Measures, command_line
from originals import cases, original
from rich.console import Console

from jointopt import SearchSpace, Supernet
from jointopt.evaluation.evaluation import measured
from search_spaces.family import is_depth


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/originals")
    parser.add_argument("--cases", nargs="+", default=["vit", "resnet", "minilm", "smollm2"])
    parser.add_argument("--genomes", type=int, default=10)
    arguments = parser.parse_args()
    measures = Measures(arguments.json)
    for name in arguments.cases:
        measure(name, arguments, measures)
    Console().print(measures.table())


def measure(name: str, arguments: argparse.Namespace, measures: Measures) -> None:
    case = cases(arguments.assets)[name]
    few = 4 if case.task == "causal-lm" else 300
    case = replace(case, evaluate=replace(case.evaluate, samples=few))
    made = original(name, case, arguments.assets, arguments.work)
    space = SearchSpace.for_model(made.model, schemes=["none"])
    for repair in (False, True):
        supernet = Supernet(made.model, space, repair=repair)
        supernet.calibrate(made.calibrate)
        widths = [not is_depth(gene) for gene in space.names]
        found = []
        for genome in space.sample(arguments.genomes, seed=0):
            with supernet.active(np.where(widths, genome, space.largest)) as model:
                found.append(measured(made.quality, model))
        for metric in (case.metric, "kl"):
            value = float(np.median([each[metric] for each in found]))
            better = "higher" if metric == "accuracy" else "lower"
            measures.tell(f"{name}/{'least squares' if repair else 'none'}", metric, value, None, better)


if __name__ == "__main__":
    main()
