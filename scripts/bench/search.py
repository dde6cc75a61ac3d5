"""How much of the front each search has after so many evaluations, on problems with a known law.

    pip install -e .[bench]
    python scripts/bench/search.py --json search.json
    python scripts/bench/search.py --problems add60 scrambled150 --searches guided optuna_gp --seeds 10

Hypervolume is that of the noise-free values of what was evaluated, as a share of the box between the problem's
corners (see problems.py); the searches see the noisy values. Every search sees the same problem, and starts from its
own seed. `--problem-seed` draws other problems of the same kinds. Medians, with quartiles, over the seeds.
Derived: the fewest evaluations with which guided's median reaches what NSGA-II has after 500 and LINAS after 300; and
guided's own time an evaluation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from peers import PEERS
from problems import Problem, families
from rich.console import Console
from rich.table import Table

from jointopt import strategies
from jointopt.strategies.guided_search import Beliefs, GuidedSearch

MARKS = (25, 50, 100, 200, 400)
BATCH = 10
STEP = 5
EVALUATIONS = {
    "pymoo_nsga2": 500,
    "optuna_nsga2": 500,
    "evolutionary": 500,
    "linas": 300,
    "optuna_tpe": 100,
    "optuna_gp": 50,
}
"""How far a search is followed where it is not as far as guided: slow ones less, those compared at 500 more."""
DEFAULT_PROBLEMS = ("add60", "pairs60", "accuracy60", "scrambled60", "pairs150", "pairs400", "three60")
DEFAULT_SEARCHES = ("guided", "evolutionary", "random", "pymoo_nsga2", "linas", "optuna_tpe")


def makers() -> dict[str, Callable]:
    """name -> (space, objectives, seed) -> something with ask and tell."""

    def own(name: str) -> Callable:
        return lambda space, objectives, seed: strategies.create(name, space, objectives, seed=seed)

    return {name: own(name) for name in strategies.STRATEGIES} | PEERS


def followed(problem: Problem, make: Callable, seed: int, evaluations: int) -> tuple[np.ndarray, float]:
    """Noise-free values of what was evaluated, in order [evaluations, objectives]; seconds the search itself took."""
    random = np.random.default_rng([seed, 1])
    started = time.perf_counter()
    search = make(problem.space, problem.objectives, seed)
    own, values = time.perf_counter() - started, np.empty((0, len(problem.objectives)))
    while len(values) < evaluations:
        started = time.perf_counter()
        genomes = search.ask(min(BATCH, evaluations - len(values)))
        own += time.perf_counter() - started
        exact = problem.exact(genomes)
        values = np.vstack([values, exact])
        started = time.perf_counter()
        search.tell(genomes, problem.noise(exact, random))
        own += time.perf_counter() - started
    return values[:evaluations], own


def volumes(problem: Problem, make: Callable, seeds: int, evaluations: int) -> tuple[np.ndarray, float]:
    """Hypervolume after each STEP evaluations [seeds, evaluations / STEP]; seconds an evaluation, the median."""
    curves, times = [], []
    for seed in range(seeds):
        values, own = followed(problem, make, seed, evaluations)
        curves.append([problem.volume(values[:count]) for count in range(STEP, evaluations + 1, STEP)])
        times.append(own / evaluations)
    return np.array(curves), float(np.median(times))


def first_with(curve: np.ndarray, level: float) -> int | None:
    """The fewest evaluations, in steps, after which a median curve is at a level."""
    reached = np.flatnonzero(curve >= level)
    return STEP * (int(reached[0]) + 1) if len(reached) else None


def after(curves: np.ndarray, evaluations: int) -> np.ndarray:
    """The last axis of curves at so many evaluations."""
    return curves[..., evaluations // STEP - 1]


def compared(
    name: str, problem: Problem, searches: list[str], seeds: int, evaluations_of: dict[str, int], console: Console
) -> list[dict]:
    """Runs the searches on one problem, prints their table and returns its rows."""
    rows, medians = [], {}
    table = Table(
        title=f"{name}: {len(problem.space)} genes, {len(problem.objectives)} objectives; hypervolume, quartiles"
    )
    for column in ("search", *map(str, MARKS), "500", "ms each"):
        table.add_column(column, justify="left" if column == "search" else "right")
    for search in searches:
        evaluations = evaluations_of[search]
        curves, seconds = volumes(problem, makers()[search], seeds, evaluations)
        medians[search] = np.median(curves, axis=0)
        cells = []
        for mark in (*MARKS, 500):
            if mark > evaluations:
                cells.append("")
                continue
            low, middle, high = np.quantile(after(curves, mark), [0.25, 0.5, 0.75])
            cells.append(f"{middle:.3f} [dim]{low:.3f}-{high:.3f}[/]")
            rows.append(row(name, f"{search}, hypervolume after {mark}", middle, None, "higher"))
        table.add_row(search, *cells, f"{1e3 * seconds:.1f}")
        rows.append(row(name, f"{search}, own seconds an evaluation", seconds, None, "lower"))
    console.print(table)
    return rows + derived(name, medians)


def derived(name: str, medians: dict[str, np.ndarray]) -> list[dict]:
    """What the curves of one problem say about guided against the others."""
    if "guided" not in medians:
        return []
    guided, rows = medians["guided"], []
    for peer, count, aim in (("pymoo_nsga2", 500, 25), ("evolutionary", 500, 25), ("linas", 300, 50)):
        if peer in medians:
            needed = first_with(guided, after(medians[peer], count))
            value = needed or f"over {STEP * len(guided)}"
            rows.append(row(name, f"evaluations for {peer}'s {count}", value, aim, "lower"))
    for peer in ("optuna_tpe", "optuna_gp"):
        if peer in medians:
            marks = [mark for mark in MARKS if mark <= STEP * min(len(guided), len(medians[peer]))]
            lead = float(min(after(guided, mark) - after(medians[peer], mark) for mark in marks))
            rows.append(row(name, f"smallest lead over {peer}", lead, 0.0, "higher"))
    return rows


def row(case: str, measure: str, value, aim, better: str) -> dict:
    return {"case": case, "measure": measure, "value": value, "aim": aim, "better": better}


def own_speed(problem: Problem, evaluations: int) -> list[dict]:
    """Guided's own time at a size, and how many genomes its predictors take a second in the end."""
    case = f"{len(problem.space)} genes, {evaluations} evaluations"
    _, seconds = volumes(problem, makers()["guided"], 1, evaluations)
    search = GuidedSearch(problem.space, problem.objectives)
    genomes = problem.space.sample(evaluations, 0)
    search.tell(genomes, problem.exact(genomes))
    beliefs = Beliefs(search, search.told, search.costs())
    many = problem.space.canonical(
        np.random.default_rng(0).integers(0, problem.space.sizes, (20000, len(problem.space)))
    )
    started = time.perf_counter()
    for predictor in beliefs.predictors.values():
        predictor(many)
    rate = len(many) / (time.perf_counter() - started)
    return [
        row(case, "guided, own seconds an evaluation", seconds, 1.0, "lower"),
        row(case, "predictions a second", rate, 1e5, "higher"),
    ]


def main() -> None:
    known = families()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=[*known, "all"], default=DEFAULT_PROBLEMS)
    parser.add_argument("--searches", nargs="+", choices=[*makers(), "all"], default=DEFAULT_SEARCHES)
    parser.add_argument("--seeds", type=int, default=3, help="of each search (default 3)")
    parser.add_argument("--evaluations", type=int, default=MARKS[-1], help="of guided and random (default 400)")
    parser.add_argument("--problem-seed", type=int, default=0, help="draws other problems of the same kinds")
    parser.add_argument("--no-speed", action="store_true", help="leave out the run that measures guided's own time")
    parser.add_argument("--json", type=Path, help="where the rows go: case, measure, value, aim, better")
    given = parser.parse_args()
    names = list(known) if "all" in given.problems else given.problems
    searches = list(makers()) if "all" in given.searches else given.searches
    evaluations_of = {search: EVALUATIONS.get(search, given.evaluations) for search in searches}
    console, rows = Console(width=140), []
    for name in names:
        rows += compared(name, families(given.problem_seed)[name](), searches, given.seeds, evaluations_of, console)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1))
    if not given.no_speed:
        rows += own_speed(families(given.problem_seed)["speed200"](), 500)
    aims = Table(title="against the aims")
    for column in ("case", "measure", "value", "aim"):
        aims.add_column(column)
    for each in rows:
        if each["aim"] is not None:
            value = each["value"] if isinstance(each["value"], str) else f"{each['value']:.4g}"
            aims.add_row(each["case"], each["measure"], value, f"{each['aim']:g}, {each['better']}")
    console.print(aims)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
