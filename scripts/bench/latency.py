"""How far latencies can be believed: look-up and roofline beside sub-networks timed end to end in ONNX Runtime.

    python scripts/assets.py assets digits minilm movies smollm2 text
    python scripts/bench/latency.py --assets assets --json latency.json
    python scripts/bench/latency.py --assets assets --cases minilm --genomes 40
    python scripts/bench/latency.py --assets assets --backend torch --cases digits_vit digits_resnet minilm

For each case random sub-networks are exported to ONNX, and timed in turns for at least half a minute, medians, on one
thread. A first few of them fit the look-up, and the roofline whose rates are those of 48 of the operators; the errors
are those on all others: mean absolute relative error (MAPE), and Kendall's tau. Exports are kept in --work; but for
smollm2's, which weigh some 300 MB and take a minute each: one at a time is loaded and timed, in turns with the first
for 20 seconds, and deleted unless --export-only had made it.

With --backend torch sub-networks are extracted and timed in torch, and the look-up is that of torch.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import networks
import numpy as np
import torch
from loading import padded
from measures import Measures, command_line
from networks import Network
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

import jointopt
from jointopt import Lookup, Roofline, SearchSpace, Supernet
from jointopt.evaluation.workers import threads_of_torch
from jointopt.timing.timers import in_turns, run_of_export, time_exports

SCHEMES = {"onnxruntime": ("none", "W8A8", "W8A8_STATIC", "W4A16"), "torch": ("none", "W4A16")}
FIT = 8
"""Sub-networks that the look-up and the roofline are fitted by."""
BATCHES = {"digits_vit": 8, "digits_resnet": 8, "minilm": 1, "smollm2": 1}
LENGTHS = {"minilm": 128, "smollm2": 64}
LARGE = ("smollm2",)
LEAST, APART = 30.0, 20.0
"""Seconds for which exports are timed: all of a case that are beside each other, a pair of those that are not."""


def supernet_of(name: str, network: Network, arguments: argparse.Namespace) -> tuple[Supernet, dict]:
    """An untrained super-network, which is timed like a trained one, and a batch of inputs."""
    loaded = networks.start(network, arguments.assets, arguments.work)
    source = replace(network.calibrate, samples=16, length=LENGTHS.get(name))
    batch = dict(loaded.inputs(source, BATCHES[name])[0])
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones(BATCHES[name], LENGTHS[name], dtype=torch.long)
        batch = padded(batch, LENGTHS[name])
    space = SearchSpace.for_model(loaded.model, schemes=SCHEMES[arguments.backend], **network.space)
    supernet = Supernet(loaded.model, space)
    supernet.calibrate([batch])
    return supernet, batch


def place_of(folder: Path, genome: np.ndarray) -> Path:
    return folder / "-".join(map(str, genome))[-120:]


def exported(supernet: Supernet, genome: np.ndarray, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = place_of(folder, genome)
    if not path.is_dir():
        jointopt.export(supernet, genome, path, target="onnxruntime")
    return path


def one_at_a_time(supernet: Supernet, genomes: np.ndarray, folder: Path) -> Iterator[Path]:
    """Exports that do not fit beside each other: each is deleted when the next is asked for, unless it was there."""
    for genome in genomes:
        there = place_of(folder, genome).is_dir()
        yield exported(supernet, genome, folder)
        if not there:
            shutil.rmtree(place_of(folder, genome))


def predicted(supernet: Supernet, model: Lookup | Roofline, genomes: np.ndarray) -> np.ndarray:
    return supernet.costs_by(model).columns(genomes)["latency"]


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/latency")
    parser.add_argument("--cases", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--backend", choices=list(SCHEMES), default="onnxruntime")
    parser.add_argument("--genomes", type=int, default=40, help="timed end to end, beside those that fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="of timing, at least")
    parser.add_argument("--export-only", action="store_true", help="times nothing: for later, on a quiet machine")
    arguments = parser.parse_args()
    console, measures = Console(), Measures(arguments.json)
    table = Table("case", "genomes", "end to end, ms", "look-up MAPE", "tau", "roofline MAPE", "tau")
    for name in arguments.cases:
        supernet, batch = supernet_of(name, networks.networks(arguments.assets)[name], arguments)
        genomes = supernet.space.sample(FIT + arguments.genomes, seed=0)
        folder = arguments.work / name
        in_torch = arguments.backend == "torch"
        if not in_torch and (arguments.export_only or name not in LARGE):
            paths = [exported(supernet, genome, folder) for genome in genomes]
        if arguments.export_only:
            continue
        operators = arguments.work / "operators.json"
        lookup = Lookup.of(
            supernet, BATCHES[name], threads=arguments.threads, path=operators, backend=arguments.backend
        )
        if in_torch:
            models = [supernet.extract(genome) for genome in genomes]
            with threads_of_torch(arguments.threads), torch.inference_mode():
                timed = in_turns([partial(model, **batch) for model in models], arguments.rounds, LEAST)
        elif name in LARGE:
            exports = one_at_a_time(supernet, genomes, folder)
            timed = time_exports(exports, batch, lookup.backend, arguments.rounds, APART)
        else:
            runs = [run_of_export(path, batch, lookup.backend) for path in paths]
            timed = in_turns(runs, arguments.rounds, LEAST)
        seconds = np.array(timed)
        lookup = lookup.fit(supernet, list(genomes[:FIT]), timed[:FIT])
        models_of_time: list[tuple[str, Lookup | Roofline, tuple[float, float]]] = [("look-up", lookup, (0.1, 0.9))]
        if not in_torch:
            roofline = jointopt.fit_roofline(supernet, BATCHES[name], threads=arguments.threads, path=operators)
            roofline = roofline.fit(supernet, list(genomes[:FIT]), timed[:FIT])
            models_of_time.append(("roofline", roofline, (0.25, 0.8)))
        cells = [name, str(arguments.genomes), f"{seconds.min() * 1e3:.3g} to {seconds.max() * 1e3:.3g}"]
        for kind, model, aims in models_of_time:
            found = predicted(supernet, model, genomes)[FIT:]
            mape = float(np.abs(found / seconds[FIT:] - 1).mean())
            tau = float(kendalltau(found, seconds[FIT:]).statistic)
            cells += [f"{mape:.1%}", f"{tau:.3f}"]
            case = f"{name}, torch" if in_torch else name
            measures.tell(case, f"{kind}, MAPE", mape, aims[0], "lower")
            measures.tell(case, f"{kind}, tau", tau, aims[1], "higher")
        console.print(name, {key: f"{value:.3g}" for key, value in lookup.factors.items()}, highlight=False)
        table.add_row(*cells)
    if not arguments.export_only:
        console.print(table)


if __name__ == "__main__":
    main()
