"""Records real evaluations of a super-network as a table, from which scripts/bench/search.py makes a search problem.

    python scripts/assets.py assets digits minilm movies
    python scripts/bench/record.py digits_vit --assets assets
    python scripts/bench/record.py minilm --assets assets

The genomes: drawn evenly; strewn along the diagonal from the smallest to the largest; and those that guided and
evolutionary searches visit on their way to the front. Each part is a study in --work, so that a recording that was
stopped goes on; the finished table is scripts/bench/tables/NAME.npz:

    genomes int16 [n, genes]; values float32 [n, metrics]; and three JSON strings, space (SearchSpace.to_dict),
    metrics (the names of the values' columns) and made (command, seeds, versions, parts, and the standard error that
    each measured metric has for being taken on a sample of the data).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from measures import command_line
from networks import Ready, prepare

import jointopt
from jointopt import Study
from jointopt.evaluation.evaluation import evaluate, measured
from jointopt.objectives import named
from search_spaces.space import SearchSpace

METRICS = ("accuracy", "loss", "kl", "size", "macs")
TABLES = Path(__file__).parent / "tables"
SEARCHES = {
    "guided loss size": ("guided", ["loss", "size"]),
    "guided accuracy size": ("guided", ["accuracy", "size"]),
    "guided kl macs size": ("guided", ["kl", "macs", "size"]),
    "evolutionary loss size": ("evolutionary", ["loss", "size"]),
    "evolutionary accuracy macs size": ("evolutionary", ["accuracy", "macs", "size"]),
}
SHARES = {"random": 0.2, "diagonal": 0.3, **dict.fromkeys(SEARCHES, 0.1)}


def diagonal(space: SearchSpace, n: int, seed: int) -> np.ndarray:
    """Distinct genomes [n, genes] at levels from 0 to 1: each gene is at the large end with that chance, else at the
    small end or at any choice."""
    random = np.random.default_rng(seed)
    found: dict[bytes, np.ndarray] = {genome.tobytes(): genome for genome in (space.smallest, space.largest)}
    while len(found) < n:
        level = random.random()
        lower = np.where(random.random(len(space)) < 0.5, space.smallest, random.integers(0, space.sizes))
        genome = space.canonical(np.where(random.random(len(space)) < level, space.largest, lower))
        found.setdefault(genome.tobytes(), genome)
    return np.array(list(found.values()))


def record_given(ready: Ready, genomes: Iterable[np.ndarray], storage: Path) -> Study:
    """Evaluates the genomes that the study does not have yet."""
    study = Study.create(storage, ready.supernet.space, [named("loss"), named("size")], {})
    for genome in genomes:
        if study.results([genome])[0] is None:
            found = evaluate(ready.supernet, genome, ready.quality)
            study.add_evaluation(0, genome, found.metrics, found.failed, found.seconds)
    return study


def record_search(ready: Ready, name: str, evaluations: int, storage: Path) -> Study:
    strategy, objectives = SEARCHES[name]
    return jointopt.search(ready.supernet, ready.quality, objectives, evaluations, storage, strategy=strategy)


def standard_errors(ready: Ready, genomes: np.ndarray) -> dict[str, float]:
    """Of accuracy, loss and KL divergence as means over the samples that they are taken on: the median over genomes."""
    found = []
    for genome in genomes:
        with ready.supernet.active(genome) as model:
            found.append(measured(ready.quality, model).errors)
    return {name: float(np.median([each[name] for each in found])) for name in ("accuracy", "loss", "kl")}


def main() -> None:
    parser = command_line(__doc__, rows=False, assets=True, work="runs/networks")
    parser.add_argument("name", choices=["digits_vit", "minilm"])
    parser.add_argument("--evaluations", type=int, default=2000)
    arguments = parser.parse_args()
    ready = prepare(arguments.name, arguments.assets, arguments.work)
    space, counts = ready.supernet.space, {name: int(share * arguments.evaluations) for name, share in SHARES.items()}
    print(f"{space}, {counts}", flush=True)
    given = {
        "random": space.sample(counts["random"], 0),
        "diagonal": diagonal(space, counts["diagonal"], 0),
    }
    frames = []
    for name, count in counts.items():
        started, storage = time.perf_counter(), arguments.work / f"{arguments.name}-{name.replace(' ', '-')}.db"
        if name in given:
            study = record_given(ready, given[name], storage)
        else:
            study = record_search(ready, name, count, storage)
        frames.append(study.evaluations())
        study.close()
        print(f"{name}: {len(frames[-1])} evaluations, {time.perf_counter() - started:.0f} s", flush=True)
    write(arguments, ready, counts, frames)


def write(arguments: argparse.Namespace, ready: Ready, counts: dict[str, int], frames: list) -> None:
    """All distinct genomes that did not fail, in the order of their evaluation."""
    rows = {
        row["genome"]: [row[name] for name in METRICS]
        for frame in frames
        for row in frame[frame["failed"].isna()].to_dict("records")
    }
    space = ready.supernet.space
    made = {
        "command": f"python scripts/bench/record.py {arguments.name} --evaluations {arguments.evaluations}",
        "seeds": {"training": 0, "genomes": 0, "searches": 0},
        "parts": {name: len(frame) for name, frame in zip(counts, frames, strict=True)},
        "samples": sum(len(batch["labels"]) for batch in ready.batches),
        "seconds per evaluation, median": round(float(np.median([s for f in frames for s in f["seconds"]])), 4),
        "standard errors": standard_errors(ready, diagonal(space, 16, 1)),
        "versions": {"torch": torch.__version__, "jointopt": jointopt.__version__},
    }
    TABLES.mkdir(exist_ok=True)
    target = TABLES / f"{arguments.name}.npz"
    np.savez_compressed(
        target,
        genomes=np.array(list(rows), dtype=np.int16),
        values=np.array(list(rows.values()), dtype=np.float32),
        space=json.dumps(space.to_dict()),
        metrics=json.dumps(METRICS),
        made=json.dumps(made),
    )
    print(f"{target}: {len(rows)} genomes, {target.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
