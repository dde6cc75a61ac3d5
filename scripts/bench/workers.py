"""How much faster a search's evaluations are on several workers.

    python scripts/bench/workers.py --json workers.json
    python scripts/bench/workers.py --case digits

`digits`: batches of real evaluations of the digits ViT (`scripts/assets.py` makes it), in this process and on 2
workers in turns, one thread an evaluation; the median of the pairs. `sleeping`: the loop of a search on a pool of 8
and 64 workers, whose evaluations sleep for up to a quarter more or less than a mean; each worker is a thread here, so
that what is measured is how well the pool keeps them busy, and not the machine. In batches of 10 more than 10 workers
wait; batches of 8 for each worker, and asynchronous searches, are what many workers are for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import Measures, command_line
from rich.console import Console

from jointopt import Gene, SearchSpace
from jointopt.evaluation.evaluation import Evaluation
from jointopt.evaluation.sharing import evaluation_order
from jointopt.evaluation.workers import Evaluator, Pool, Processes, Serial
from jointopt.loop.loop import _Run
from jointopt.loop.stopping import Budget, Watch
from jointopt.objectives import Objective
from jointopt.strategies import create
from jointopt.study.study import Study

SPACE = SearchSpace([Gene(f"gene{at}", (0, 1, 2, 3)) for at in range(40)])
OBJECTIVES = [Objective("loss", "min"), Objective("size", "min", compute=lambda genomes: genomes.sum(1) * 1.0)]


class Sleeping:
    """A place of `jointopt.evaluation.workers` whose workers are threads that sleep."""

    def __init__(self, mean: float):
        self.mean = mean
        self.heard: queue.Queue[tuple[Any, str, Any]] = queue.Queue()

    def start(self, slot: int) -> Sleeper:
        return Sleeper(self)

    def events(self, workers: Sequence[Any], seconds: float | None) -> list[tuple[Any, str, Any]]:
        found = [self.heard.get()]
        while not self.heard.empty():
            found.append(self.heard.get())
        return found

    def close(self) -> None:
        """They end by themselves."""


class Sleeper:
    def __init__(self, place: Sleeping):
        self.place = place
        place.heard.put((self, "ready", None))

    def give(self, genomes: np.ndarray) -> None:
        threading.Thread(target=self._sleep, args=(genomes,), daemon=True).start()

    def _sleep(self, genomes: np.ndarray) -> None:
        for at, genome in enumerate(genomes):
            # The same genome takes as long whoever evaluates it.
            chance = np.random.default_rng(genome).uniform(0.75, 1.25)
            time.sleep(self.place.mean * chance)
            metrics = {"loss": float(-np.sqrt(genome).sum()), "size": float(genome.sum())}
            self.place.heard.put((self, "ended", (at, Evaluation(metrics, None, 0.0))))


def slept(genomes: np.ndarray, mean: float) -> float:
    return sum(mean * np.random.default_rng(genome).uniform(0.75, 1.25) for genome in genomes)


def sleeping_rows(workers: int, mean: float, rounds: int) -> list[tuple[str, float, float | None]]:
    """What a pool makes of its workers, by the loop of a search whose strategy takes no time."""
    rows: list[tuple[str, float, float | None]] = []
    for told, batch, asynchronous in (
        ("batches of 10", 10, False),
        (f"batches of {8 * workers}", 8 * workers, False),
        ("asynchronous", 10, True),
    ):
        count = rounds * (batch if batch > 10 else 8 * workers)
        study = Study.create(None, SPACE, OBJECTIVES, {})
        asking, budget = create("random", SPACE, OBJECTIVES), Budget(count)
        pool = Pool(Sleeping(mean), workers, lambda genomes: np.arange(len(genomes)))
        run = _Run(study, asking, pool, budget, Watch(study, budget, False), batch)
        started = time.perf_counter()
        run.stream() if asynchronous else run.batches()
        wall = time.perf_counter() - started
        genomes = np.array(study.evaluations()["genome"].tolist())
        aim = None if told == "batches of 10" else 0.9 * workers
        rows.append((f"{workers} workers, {told} / 1 worker", slept(genomes, mean) / wall, aim))
    return rows


def digits_rows(assets: Path, work: Path, genomes: int, repeats: int) -> list[tuple[str, float, float | None]]:
    """Real evaluations: this process alone and a pool of 2, in turns, each with one thread an evaluation."""
    from networks import prepare

    torch.set_num_threads(1)
    ready = prepare("digits_vit", assets, work)
    order = partial(evaluation_order, ready.supernet)
    alone = Serial(ready.supernet, ready.quality, 1)
    pool = Pool(Processes(ready.supernet, ready.quality, 2, 1), 2, order)
    drawn = ready.supernet.space.sample((repeats + 1) * genomes, 0).reshape(repeats + 1, genomes, -1)
    try:
        started = time.perf_counter()
        taken(pool, drawn[0])
        start = time.perf_counter() - started
        # Every weight has been quantized once, as in the steady state of a search.
        taken(alone, drawn[0])
        taken(pool, drawn[0])
        ratios = [taken(alone, each) / taken(pool, each) for each in drawn[1:]]
    finally:
        pool.close()
    told = f"2 workers / 1, batches of {genomes}"
    return [(told, float(np.median(ratios)), 1.8), ("start of 2 workers and first batch (s)", start, None)]


def taken(evaluator: Evaluator, genomes: np.ndarray) -> float:
    """Seconds until all are evaluated."""
    started = time.perf_counter()
    evaluator.submit(list(range(len(genomes))), genomes)
    left = len(genomes)
    while left:
        left -= len(evaluator.collect(None))
    return time.perf_counter() - started


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/networks")
    parser.add_argument("--case", choices=("digits", "sleeping"), action="append", help="default: all")
    parser.add_argument("--genomes", type=int, default=10, help="real evaluations in a batch")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of timings of real batches")
    parser.add_argument("--mean", type=float, default=0.5, help="seconds that an evaluation sleeps")
    given = parser.parse_args()
    measures = Measures(given.json)
    for case in given.case or ("digits", "sleeping"):
        if case == "digits":
            found = digits_rows(given.assets, given.work, given.genomes, given.repeats)
        else:
            found = [row for workers in (8, 64) for row in sleeping_rows(workers, given.mean, rounds=3)]
        for measure, value, aim in found:
            measures.tell(case, measure, value, aim, "lower" if measure.endswith("(s)") else "higher")
    Console().print(measures.table("Evaluations in a time, as multiples of one worker's"))


if __name__ == "__main__":
    main()
