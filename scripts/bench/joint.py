"""Joint search against its halves: architecture only, precision only, and one after the other.

    python scripts/assets.py assets minilm movies
    python scripts/bench/joint.py --case minilm --assets assets --json joint-minilm.json
    python scripts/assets.py assets smollm2 text
    python scripts/bench/joint.py --case smollm2 --assets assets --json joint-smollm2.json

Each case is one super-network, fine-tuned once by the sandwich rule (kept in --work) and searched four ways with the
same number of evaluations: all genes; architecture alone, in the best uniform scheme; number formats alone; the
architecture with half of the evaluations, then the formats of what that chose. Hypervolume is measured from the
whole fine-tuned model's size and a floor of quality, as a share of the box between; the front's is measured again on
data that no search saw. The size is that of the smallest evaluated genome whose quality reaches the stated level; its
quality is measured again there, too.
Medians over the seeds. Studies are kept in --work, so that a bench that was stopped goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from loading import Loaded, tune
from measures import Measures, command_line
from networks import all_in
from rich.console import Console
from rich.table import Table

import jointopt
from jointopt import Gene, SearchSpace, Study, Supernet
from jointopt.objectives import hypervolume, non_dominated
from jointopt.rows import DataSource
from search_spaces.precision import is_precision

SCHEMES = ["none", "W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4"]
UNIFORM = ["W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4"]


@dataclass(frozen=True)
class Case:
    """What is searched, on what, and how it is judged.

    Attributes:
        unseen: what only the chosen genomes are scored on.
        floor: worst quality inside the box, accuracy as a difference, perplexity as a share of the whole model's.
        level: quality at which sizes are compared, likewise.
    """

    task: str
    metric: str
    train: DataSource
    calibrate: DataSource
    evaluate: DataSource
    unseen: DataSource
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
            DataSource(str(movies / "train.csv"), length=64),
            DataSource(str(movies / "train.csv"), samples=128, length=64),
            DataSource(str(movies / "valid.csv"), samples=400, length=64),
            DataSource(str(movies / "test.csv"), length=64),
            steps=400,
            batch_size=32,
            learning_rate=1e-4,
            architecture={"depth": [2, 3, 4, 5, 6], "heads": [3, 6, 9, 12], "mlp": [384, 768, 1152, 1536]},
            floor=-0.15,
            level=-0.01,
        ),
        "smollm2": Case(
            "causal-lm",
            "perplexity",
            DataSource(str(text / "calibrate.txt"), length=128),
            DataSource(str(text / "calibrate.txt"), samples=8, length=256),
            DataSource(str(text / "evaluate.txt"), samples=2, length=256),
            DataSource(str(text / "test.txt"), samples=8, length=256),
            steps=100,
            batch_size=2,
            learning_rate=1e-4,
            architecture={"depth": [24, 26, 27, 28, 29, 30], "mlp": [768, 1024, 1280, 1408, 1536]},
            floor=1.0,
            level=0.05,
        ),
    }


def prepared(name: str, case: Case, arguments: argparse.Namespace):
    """(model, quality functions seen and unseen, calibration batches, file of the fine-tuned super-network)."""
    torch.manual_seed(0)
    loaded = Loaded(arguments.assets / name, case.task)
    inputs = loaded.inputs(case.calibrate, case.batch_size)
    tuned, train = arguments.work / f"{name}.safetensors", loaded.batches(case.train, case.batch_size)
    supernet = Supernet(loaded.model, SearchSpace.for_model(loaded.model, schemes=["none"], **case.architecture))
    tune(supernet, tuned, inputs, train, case.steps, learning_rate=case.learning_rate, progress=True)
    seen, unseen = (loaded.quality(loaded.batches(source, case.batch_size)) for source in (case.evaluate, case.unseen))
    return loaded.model, seen, unseen, inputs, tuned


@dataclass(frozen=True)
class Run:
    """A finished search."""

    supernet: Supernet
    study: Study


class Bench:
    """One case's super-network under any search space.

    Attributes:
        base: quality, quality on unseen data and size in bytes of the whole, fine-tuned, unquantized model.
        uniform: the scheme of the architecture-only search.
    """

    def __init__(self, name: str, case: Case, arguments: argparse.Namespace):
        self.case, self.arguments = case, arguments
        self.model, self.quality, self.unseen, self.inputs, self.tuned = prepared(name, case, arguments)
        self.sign = -1.0 if case.metric == "perplexity" else 1.0
        whole = self.supernet(schemes=["none"], **case.architecture)
        largest = whole.space.largest
        scores = [self.score(whole, largest, quality) for quality in (self.quality, self.unseen)]
        self.base = (*scores, whole.costs(largest)["size"])
        self.uniform = self.best_uniform()

    def supernet(self, **options) -> Supernet:
        return self.tuned_supernet(SearchSpace.for_model(self.model, **options))

    def tuned_supernet(self, space: SearchSpace) -> Supernet:
        supernet = Supernet(self.model, space)
        supernet.load(self.tuned)
        supernet.calibrate(self.inputs)
        return supernet

    def score(self, supernet: Supernet, genome, quality) -> float:
        with supernet.active(genome) as model:
            return float(quality(model)[self.case.metric])

    def reaches(self, quality: float) -> bool:
        level = self.case.level
        return quality >= self.base[0] + level if self.sign > 0 else quality <= self.base[0] * (1 + level)

    def best_uniform(self) -> str:
        """The uniform scheme with the smallest whole model among those that keep the level, else the best quality."""
        found = {}
        for name in UNIFORM:
            supernet = self.supernet(schemes=["none", name], preset="fixed")
            genome = all_in(supernet.space, name)
            found[name] = (self.score(supernet, genome, self.quality), supernet.costs(genome)["size"])
            print(f"uniform {name}: {self.case.metric} {found[name][0]:.4g}, {found[name][1] / 1e6:.4g} MB", flush=True)
        good = [name for name, (quality, _) in found.items() if self.reaches(quality)]
        if good:
            return min(good, key=lambda name: found[name][1])
        return max(found, key=lambda name: found[name][0] * self.sign)

    def search(self, name: str, supernet: Supernet, evaluations: int, seed: int) -> Run:
        storage = self.arguments.work / f"{self.arguments.case}-{name}-{seed}.db"
        objectives = [self.case.metric, "size"]
        return Run(supernet, jointopt.search(supernet, self.quality, objectives, evaluations, storage, seed))

    def runs(self, name: str, seed: int) -> list[Run]:
        """The searches of one of `SEARCHES`, whose evaluations sum up to the same number."""
        count, shape = self.arguments.evaluations, self.case.architecture
        if name == "joint":
            return [self.search(name, self.supernet(schemes=SCHEMES, **shape), count, seed)]
        if name == "architecture only":
            return [self.search("architecture", self.supernet(schemes=[self.uniform], **shape), count, seed)]
        if name == "precision only":
            return [self.search("precision", self.supernet(schemes=SCHEMES, preset="fixed"), count, seed)]
        first = self.search("first", self.supernet(schemes=["none"], **shape), count // 2, seed)
        return [first, self.search("second", self.narrowed(first), count - count // 2, seed)]

    def narrowed(self, first: Run) -> Supernet:
        """Number formats for the smallest architecture at the level of quality (the best, where none reaches it)."""
        genome = self.smallest([first])
        best = first.study.best() if genome is None else genome[1]
        chosen = first.study.space.decode(best)
        space = self.supernet(schemes=SCHEMES, **self.case.architecture).space
        kept = [gene for gene in space.genes if is_precision(gene.name) or gene.name in chosen]
        fixed = {name: (choice,) for name, choice in chosen.items()}
        genes = [Gene(gene.name, fixed.get(gene.name, gene.choices)) for gene in kept]
        return self.tuned_supernet(SearchSpace(genes))

    def evaluated(self, runs: list[Run]) -> pd.DataFrame:
        """All evaluations of the searches, with the `run` that each is of."""
        frames = [run.study.evaluations().assign(run=at) for at, run in enumerate(runs)]
        return pd.concat(frames).dropna(subset=[self.case.metric, "size"])

    def costs(self, qualities: np.ndarray, sizes: np.ndarray, whole: float) -> np.ndarray:
        """As shares of the box: how much worse than the whole model's quality, and the size [n, 2]."""
        span = abs(self.case.floor) if self.sign > 0 else whole * self.case.floor
        return np.stack([self.sign * (whole - qualities) / span, sizes / self.base[2]], axis=1)

    def smallest(self, runs: list[Run]) -> tuple[Run, np.ndarray] | None:
        """The smallest evaluated genome at the level of quality, with the search that it is of."""
        rows = self.evaluated(runs).sort_values("size", kind="stable")
        good = rows[[self.reaches(quality) for quality in rows[self.case.metric]]]
        return (runs[good["run"].iloc[0]], np.array(good["genome"].iloc[0])) if len(good) else None

    def judged(self, runs: list[Run]) -> dict[str, float]:
        """Hypervolume, that of the front on unseen data, size at the level in MB, and by how much that genome is worse
        on unseen data."""
        rows, (quality, unseen, _) = self.evaluated(runs), self.base
        costs = self.costs(rows[self.case.metric].to_numpy(), rows["size"].to_numpy(), quality)
        front = rows[non_dominated(costs) & (costs < 1).all(axis=1)]
        places = zip(front["run"], front["genome"], strict=True)
        again = np.array([self.score(runs[at].supernet, np.array(genome), self.unseen) for at, genome in places])
        measures = {
            "hypervolume": hypervolume(costs, [1.0, 1.0]),
            "unseen_hypervolume": hypervolume(self.costs(again, front["size"].to_numpy(), unseen), [1.0, 1.0]),
            "size_mb": np.nan,
            "unseen_loss": np.nan,
        }
        if (chosen := self.smallest(runs)) is not None:
            run, genome = chosen
            score = self.score(run.supernet, genome, self.unseen)
            measures["size_mb"] = run.supernet.costs(genome)["size"] / 1e6
            measures["unseen_loss"] = unseen - score if self.sign > 0 else score / unseen - 1
        return measures


SEARCHES = ("joint", "architecture only", "precision only", "one after the other")


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/joint")
    parser.add_argument("--case", choices=["minilm", "smollm2"], default="minilm")
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    bench = Bench(arguments.case, cases(arguments.assets)[arguments.case], arguments)
    base = f"{bench.case.metric} {bench.base[0]:.4g} (unseen {bench.base[1]:.4g}), {bench.base[2] / 1e6:.4g} MB"
    print(f"whole, fine-tuned, unquantized: {base}; uniform scheme taken: {bench.uniform}", flush=True)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in SEARCHES}
    for seed in range(arguments.seeds):
        for name in SEARCHES:
            measured[name].append(bench.judged(bench.runs(name, seed)))
            print(f"seed {seed}, {name}: {measured[name][-1]}", flush=True)
    medians = {
        name: {measure: float(np.median([each[measure] for each in found])) for measure in found[0]}
        for name, found in measured.items()
    }
    show(bench, medians)
    measures = Measures(arguments.json)
    for name, found in medians.items():
        for measure, value in found.items():
            better = "higher" if measure.endswith("hypervolume") else "lower"
            measures.keep(f"{arguments.case} {name}", measure, value, None, better)
    measures.keep(arguments.case, "better half's size / joint size", better_half(medians), 1.5, "higher")


def better_half(medians: dict[str, dict[str, float]]) -> float:
    """How many times larger the better half's size at equal quality is than the joint search's."""
    halves = [medians[name]["size_mb"] for name in ("architecture only", "precision only")]
    return float(np.nanmin([*halves, np.inf])) / medians["joint"]["size_mb"]


def show(bench: Bench, medians: dict[str, dict[str, float]]) -> None:
    arguments, case = bench.arguments, bench.case
    title = f"{arguments.case}: {arguments.evaluations} evaluations, medians of {arguments.seeds} seeds"
    unit = f"{case.level:+g}" if bench.sign > 0 else f"{case.level:+.0%}"
    at_level = f"MB at {case.metric} {unit}"
    table = Table("search", "hypervolume", "on unseen data", at_level, "worse by, on unseen data", title=title)
    for name, found in medians.items():
        table.add_row(name, *(f"{value:.4g}" for value in found.values()))
    console = Console()
    console.print(table)
    console.print(f"the better half alone is {better_half(medians):.2f}x the joint size at equal quality (aim 1.5)")


if __name__ == "__main__":
    main()
