"""What the gradients' estimate of every choice is worth: how it ranks real evaluations, and what guided saves by it.

    python scripts/assets.py assets digits minilm movies smollm2 text
    python scripts/bench/sensitivity.py --assets assets --json sensitivity.json
    python scripts/bench/sensitivity.py --assets assets --networks minilm --seeds 3

For each super-network (networks.py):
- Spearman's correlation of the sum of the estimates over a genome's choices with its real KL divergence: over random
  genomes, over those near the front, and over all choices of single genes, all others at their largest;
- the price: the CPU time of the estimate over that of an average evaluation of a random genome, with the quantized
  weights in memory, as a search has them;
- hypervolume of loss and size after 15, 25 and 50 evaluations, with and without, medians over the seeds: a share of
  the box between the least loss along the diagonal and its 0.9 quantile, the smallest and the largest size. The digits'
  networks are really evaluated, MiniLM's genomes have the values of the recorded problem (problems.py).
SmolLM2's searches are left out: it is not fine-tuned here, and an evaluation takes too long.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from measures import Measures, command_line
from networks import Ready, prepare
from problems import Problem, recorded
from record import diagonal
from rich.console import Console
from scipy.stats import spearmanr

from jointopt import Objective, strategies
from jointopt.evaluation.evaluation import evaluate
from jointopt.objectives import non_dominated
from jointopt.sensitivity import estimated_losses

MARKS = (15, 25, 50)
BATCH = 5
NETWORKS = ("digits_vit", "digits_resnet", "minilm", "smollm2")
REALLY_SEARCHED = ("digits_vit", "digits_resnet")


class Bench:
    """A super-network, its estimate, and all that was evaluated."""

    def __init__(self, ready: Ready, objective: str):
        self.ready, self.objective, self.space = ready, objective, ready.supernet.space
        self.known: dict[bytes, dict[str, float]] = {}
        estimated_losses(ready.supernet, ready.inputs)
        started = time.process_time()
        self.prior = estimated_losses(ready.supernet, ready.inputs)
        self.seconds = time.process_time() - started

    def metrics(self, genomes: np.ndarray, name: str) -> np.ndarray:
        """Real values of one metric, each genome evaluated once."""
        for genome in genomes:
            if genome.tobytes() not in self.known:
                found = evaluate(self.ready.supernet, genome, self.ready.quality)
                self.known[genome.tobytes()] = found.metrics or {}
        return np.array([self.known[genome.tobytes()].get(name, np.nan) for genome in genomes])

    def foreseen(self, genomes: np.ndarray) -> np.ndarray:
        active = self.space.active(genomes)
        tables = [self.prior[name][genomes[:, at]] * active[:, at] for at, name in enumerate(self.space.names)]
        return np.sum(tables, axis=0)

    def correlation(self, genomes: np.ndarray) -> float:
        return float(spearmanr(self.foreseen(genomes), self.metrics(genomes, "kl"))[0])

    def near_front(self, most: int) -> np.ndarray:
        """Of all that was evaluated, the layers of non-dominated genomes, first to last."""
        genomes = np.array([np.frombuffer(key, dtype=np.int64) for key in self.known])
        costs = np.stack([self.metrics(genomes, "kl"), self.metrics(genomes, "size")], axis=1)
        left, found = np.arange(len(genomes)), np.empty(0, dtype=np.int64)
        while len(found) < most:
            front = non_dominated(costs[left])
            found, left = np.concatenate([found, left[front]]), left[~front]
        return genomes[found]

    def single_changes(self, most: int) -> np.ndarray:
        """The largest genome with one gene changed, drawn from all such."""
        places = [
            (at, c) for at, size in enumerate(self.space.sizes) for c in range(size) if c != self.space.largest[at]
        ]
        drawn = np.random.default_rng(0).permutation(len(places))[:most]
        genomes = np.repeat(self.space.largest[None], len(drawn), 0)
        for row, at in enumerate(drawn):
            genomes[row, places[at][0]] = places[at][1]
        return genomes

    def volumes(self, seed: int, warm: bool, problem: Problem) -> list[float]:
        """Hypervolume at the marks of one search."""
        random = np.random.default_rng([seed, 1])
        options = {"prior": {self.objective: list(self.prior.values())}} if warm else {}
        search = strategies.create("guided", self.space, problem.objectives, seed=seed, **options)
        values = np.empty((0, 2))
        while len(values) < MARKS[-1]:
            genomes = search.ask(BATCH)
            found = problem.exact(genomes)
            search.tell(genomes, problem.noise(found, random))
            values = np.vstack([values, found])
        return [problem.volume(values[:mark]) for mark in MARKS]

    def problem(self, strewn: int) -> Problem:
        """The search of really evaluated genomes, its corners from so many along the diagonal."""
        sign = -1.0 if self.objective == "accuracy" else 1.0
        size = Objective("size", "min", lambda genomes: self.ready.supernet.cost_columns(genomes)["size"])
        wanted = (Objective(self.objective, "max" if sign < 0 else "min"), size)

        def exact(genomes: np.ndarray) -> np.ndarray:
            return np.stack([self.metrics(genomes, each.name) for each in wanted], axis=1)

        values = sign * self.metrics(diagonal(self.space, strewn, 0), self.objective)
        sizes = self.metrics(np.stack([self.space.smallest, self.space.largest]), "size")
        ideal, reference = np.array([values.min(), sizes[0]]), np.array([np.quantile(values, 0.9), sizes[1]])
        return Problem("real", self.space, wanted, exact, lambda found, random: found, ideal, reference)


def measured(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure -> value, of one super-network."""
    bench = Bench(prepare(name, arguments.assets, arguments.work), arguments.objective)
    drawn = bench.space.sample(arguments.genomes, 0)
    for genomes in (drawn, diagonal(bench.space, arguments.genomes, 0)):
        bench.metrics(genomes, "kl")
    again = drawn[:10]
    started = time.process_time()
    for genome in again:
        evaluate(bench.ready.supernet, genome, bench.ready.quality)
    found = {"price in evaluations": bench.seconds / ((time.process_time() - started) / len(again))}
    if name != "smollm2":
        really = name in REALLY_SEARCHED
        objectives = (arguments.objective, "size")
        problem = bench.problem(arguments.genomes) if really else recorded(name, objectives=objectives)
        runs = {warm: [bench.volumes(s, warm, problem) for s in range(arguments.seeds)] for warm in (False, True)}
        for at, mark in enumerate(MARKS):
            for warm, volumes in runs.items():
                key = f"{arguments.objective}: hypervolume after {mark}, {'with' if warm else 'without'}"
                found[key] = float(np.median([each[at] for each in volumes]))
        wins = [[w[at] > c[at] for w, c in zip(runs[True], runs[False], strict=True)] for at in range(len(MARKS))]
        found |= {
            f"{arguments.objective}: seeds better at {m}": float(np.mean(w)) for m, w in zip(MARKS, wins, strict=True)
        }
    found["Spearman, random genomes"] = bench.correlation(drawn)
    found["Spearman, near the front"] = bench.correlation(bench.near_front(arguments.genomes))
    found["Spearman, single changes"] = bench.correlation(bench.single_changes(arguments.genomes))
    return found


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/networks")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--objective", choices=["loss", "accuracy", "kl"], default="loss")
    parser.add_argument("--genomes", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    measures = Measures(arguments.json)
    for name in arguments.networks:
        for measure, value in measured(name, arguments).items():
            measures.tell(name, measure, value, None, "lower" if measure.startswith("price") else "higher")
    Console().print(measures.table())


if __name__ == "__main__":
    main()
