"""Joint search against its halves: architecture only, precision only, and one after the other.

    python scripts/assets.py assets minilm movies
    python scripts/bench/joint.py --case minilm --assets assets --json joint-minilm.json
    python scripts/assets.py assets smollm2 text
    python scripts/bench/joint.py --case smollm2 --assets assets --json joint-smollm2.json

Each case is one super-network, fine-tuned once by the sandwich rule (kept in --work) and searched four ways with the
same number of evaluations: all genes; architecture alone, in the best uniform scheme; number formats alone; the
architecture with half of the evaluations, then the formats of what that chose. Hypervolume is measured from the
original's size and a floor of quality, as a share of the box between; the size is that of the smallest evaluated
genome whose quality reaches the stated level. Medians over the seeds.
Studies are kept in --work, so that a bench that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import jointopt
from jointopt import SearchSpace, Study, Supernet
from jointopt.models import load_model
from jointopt.objectives import hypervolume
from jointopt.rows import DataSource
from jointopt.tasks import TASKS

SCHEMES = ["none", "W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4"]
UNIFORM = ["W8A8", "W4A16", "FP8_DYNAMIC"]


@dataclass(frozen=True)
class Case:
    """What is searched, on what, and how it is judged."""

    task: str
    metric: str
    train: DataSource
    calibrate: DataSource
    evaluate: DataSource
    steps: int
    batch_size: int
    learning_rate: float
    architecture: dict
    floor: float
    level: float


def cases(assets: Path) -> dict[str, Case]:
    movies, text = assets / "movies", assets / "text"
    return {
        "minilm": Case(
            "text-classification",
            "accuracy",
            DataSource(str(movies / "train.csv"), samples=6400),
            DataSource(str(movies / "train.csv"), samples=128),
            DataSource(str(movies / "valid.csv"), samples=500),
            steps=160,
            batch_size=32,
            learning_rate=1e-4,
            architecture={"depth": [3, 4, 5, 6], "heads": [6, 8, 10, 12], "mlp": [768, 1152, 1536]},
            floor=-0.15,
            level=-0.01,
        ),
        "smollm2": Case(
            "causal-lm",
            "perplexity",
            DataSource(str(text / "calibrate.txt"), length=128),
            DataSource(str(text / "calibrate.txt"), samples=8, length=256),
            DataSource(str(text / "evaluate.txt"), samples=4, length=256),
            steps=40,
            batch_size=4,
            learning_rate=1e-4,
            architecture={"depth": [24, 26, 28, 30], "mlp": [768, 1152, 1536]},
            floor=1.0,
            level=0.05,
        ),
    }


def prepared(name: str, case: Case, arguments: argparse.Namespace):
    """(model, quality function, calibration batches, file of the fine-tuned super-network)."""
    folder = arguments.assets / name
    torch.manual_seed(0)
    loaded = load_model(str(folder), case.task, device="cpu", dtype="float32")
    task = TASKS[case.task]

    def batches(source: DataSource, size: int):
        return task.batches(source, loaded.processor, loaded.model, size)

    calibrate = batches(case.calibrate, case.batch_size)
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in calibrate]
    tuned = arguments.work / f"{name}.safetensors"
    if not tuned.is_file():
        space = SearchSpace.for_model(loaded.model, schemes=["none"], **case.architecture)
        supernet = Supernet(loaded.model, space)
        supernet.calibrate(inputs)
        train = batches(case.train, case.batch_size)
        jointopt.train_sandwich(supernet, train, case.steps, learning_rate=case.learning_rate, progress=True)
        arguments.work.mkdir(parents=True, exist_ok=True)
        supernet.save(tuned)
    return loaded.model, task.quality(batches(case.evaluate, case.batch_size), None), inputs, tuned


class Bench:
    """One case's super-network under any search space."""

    def __init__(self, name: str, case: Case, arguments: argparse.Namespace):
        self.case, self.arguments = case, arguments
        self.model, self.quality, self.inputs, self.tuned = prepared(name, case, arguments)
        self.sign = -1.0 if case.metric == "perplexity" else 1.0

    def supernet(self, **options) -> Supernet:
        supernet = Supernet(self.model, SearchSpace.for_model(self.model, **options))
        supernet.load(self.tuned)
        supernet.calibrate(self.inputs)
        return supernet

    def search(self, name: str, supernet: Supernet, evaluations: int, seed: int) -> Study:
        storage = self.arguments.work / f"{self.arguments.case}-{name}-{seed}.db"
        return jointopt.search(supernet, self.quality, [self.case.metric, "size"], evaluations, storage, seed)

    def points(self, study: Study) -> np.ndarray:
        return study.evaluations()[[self.case.metric, "size"]].dropna().to_numpy()

    def score(self, supernet: Supernet, genome) -> float:
        with supernet.active(genome) as model:
            return float(self.quality(model)[self.case.metric])

    def whole(self) -> tuple[float, float]:
        """Quality and size of the fine-tuned, whole, unquantized model: what the searches are measured against."""
        supernet = self.supernet(schemes=["none"], **self.case.architecture)
        return self.score(supernet, supernet.space.largest), supernet.costs(supernet.space.largest)["size"]

    def best_uniform(self, base: float) -> tuple[str, dict[str, float]]:
        """The uniform scheme with the smallest whole model among those that keep the level, else the best quality."""
        found = {}
        for name in UNIFORM:
            supernet = self.supernet(schemes=["none", name], preset="fixed")
            chosen = {gene.name: gene.choices[-1] for gene in supernet.space.genes}
            genome = supernet.space.encode(chosen)
            found[name] = (self.score(supernet, genome), supernet.costs(genome)["size"])
        good = [n for n, (quality, _) in found.items() if self.reaches(quality, base, self.case.level)]
        if good:
            return min(good, key=lambda n: found[n][1]), found
        return max(found, key=lambda n: found[n][0] * self.sign), found

    def reaches(self, quality: float, base: float, level: float) -> bool:
        return quality >= base + level if self.sign > 0 else quality <= base * (1 + level)

    def variants(self, seed: int, uniform: str) -> dict[str, np.ndarray]:
        """Search -> its evaluated points [n, (quality, size)]."""
        count, shape = self.arguments.evaluations, self.case.architecture
        joint = self.search("joint", self.supernet(schemes=SCHEMES, **shape), count, seed)
        architecture = self.search("architecture", self.uniform(uniform), count, seed)
        precision = self.search("precision", self.supernet(schemes=SCHEMES, preset="fixed"), count, seed)
        return {
            "joint": self.points(joint),
            "architecture only": self.points(architecture),
            "precision only": self.points(precision),
            "one after the other": self.sequential(count, seed),
        }

    def uniform(self, name: str) -> Supernet:
        """The architecture genes, with every layer that can take the scheme in it and the others as they are."""
        return self.supernet(schemes=[name], **self.case.architecture)

    def sequential(self, count: int, seed: int) -> np.ndarray:
        first = self.search("first", self.supernet(schemes=["none"], **self.case.architecture), count // 2, seed)
        chosen = first.space.decode(first.best(knee=True))
        options = {"schemes": SCHEMES, **self.case.architecture}
        supernet = self.supernet(**options)
        fixed = {name: (choice,) for name, choice in chosen.items()}
        genes = [jointopt.Gene(gene.name, fixed.get(gene.name, gene.choices), {}) for gene in supernet.space.genes]
        genes = [g for g in genes if g.name.endswith(".precision") or g.name in chosen]
        narrowed = Supernet(self.model, SearchSpace(genes))
        narrowed.load(self.tuned)
        narrowed.calibrate(self.inputs)
        second = self.search("second", narrowed, count - count // 2, seed)
        return np.vstack([self.points(first), self.points(second)])


def judged(bench: Bench, points: np.ndarray, base: tuple[float, float]) -> dict[str, float]:
    """Hypervolume as a share of the box, and the smallest size at the level of quality, in MB."""
    quality, size = base
    floor = quality + bench.case.floor if bench.sign > 0 else quality * (1 + bench.case.floor)
    costs = np.stack([-bench.sign * points[:, 0], points[:, 1] / size], axis=1)
    span = abs(floor - quality)
    costs[:, 0] = (costs[:, 0] + bench.sign * quality) / span
    reached = np.array([bench.reaches(q, quality, bench.case.level) for q in points[:, 0]])
    smallest = points[reached, 1].min() / 1e6 if reached.any() else float("nan")
    return {"hypervolume": hypervolume(costs, [1.0, 1.0]), "size_mb": float(smallest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["minilm", "smollm2"], default="minilm")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--work", type=Path, default=Path("runs/joint"))
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    case = cases(arguments.assets)[arguments.case]
    bench = Bench(arguments.case, case, arguments)
    base = bench.whole()
    uniform, table = bench.best_uniform(base[0])
    print(f"whole, unquantized: {case.metric} {base[0]:.4g}, {base[1] / 1e6:.4g} MB; uniform {table}; taken: {uniform}")
    runs: dict[str, list[dict[str, float]]] = {}
    points: dict[str, list] = {}
    for seed in range(arguments.seeds):
        for name, found in bench.variants(seed, uniform).items():
            runs.setdefault(name, []).append(judged(bench, found, base))
            points.setdefault(name, []).append(found.tolist())
            print(f"seed {seed}, {name}: {runs[name][-1]}", flush=True)
    report(arguments, case, runs, points, base, started)


def report(arguments, case: Case, runs: dict, points: dict, base: tuple[float, float], started: float) -> None:
    medians = {name: {m: float(np.median([r[m] for r in found])) for m in found[0]} for name, found in runs.items()}
    halves = np.array([medians[n]["size_mb"] for n in ("architecture only", "precision only")])
    better_half = float(np.nanmin(halves)) if np.isfinite(halves).any() else float("nan")
    ratio = better_half / medians["joint"]["size_mb"]
    table = Table(title=f"{arguments.case}: {arguments.evaluations} evaluations, {arguments.seeds} seeds, medians")
    for column in ("search", "hypervolume", f"size at {case.metric} {case.level:+g} (MB)"):
        table.add_column(column)
    rows = []
    for name, found in medians.items():
        table.add_row(name, f"{found['hypervolume']:.4f}", f"{found['size_mb']:.3f}")
        for measure, better in (("hypervolume", "higher"), ("size_mb", "lower")):
            rows.append(
                {
                    "case": f"{arguments.case} {name}",
                    "measure": measure,
                    "value": found[measure],
                    "aim": None,
                    "better": better,
                }
            )
    rows.append(
        {
            "case": arguments.case,
            "measure": "better half's size / joint size",
            "value": ratio,
            "aim": 1.5,
            "better": "higher",
        }
    )
    console = Console()
    console.print(table)
    console.print(
        f"the better half alone is {ratio:.2f}x the joint size at equal quality (aim 1.5); "
        f"whole model: {case.metric} {base[0]:.4g}, {base[1] / 1e6:.4g} MB; {time.perf_counter() - started:.0f} s"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
        arguments.json.with_suffix(".points.json").write_text(json.dumps({"base": base, "points": points}))


if __name__ == "__main__":
    main()
