"""How much of the front each search has after so many evaluations, on problems with a known law.

    pip install -e .[bench]
    python scripts/bench/search.py --json search.json
    python scripts/bench/search.py --problems pairs60 scrambled150 --searches guided optuna_gp --seeds 10

Hypervolume is that of the noise-free values of what was evaluated, as a share of the box between the problem's
corners (see problems.py); the searches see the noisy values. Every search sees the same problem, and starts from its
own seed. `--problem-seed` draws other synthetic problems of the same kinds. Medians, with quartiles, over the seeds.

Each search is told after as many evaluations as suit it: Optuna's after each one, guided after 5 (guided_one_by_one, as
with `batch: 1`, after each one), LINAS and NSGA-II after their 50. Optuna's GP takes seconds a suggestion; `--minutes`
ends a search on a problem after that time with the seeds it has by then, whose number is in the table.

Derived: the fewest evaluations with which guided's median reaches what NSGA-II has after 500 and LINAS after 300; how
far it is ahead of TPE and GP; what each of its parts is worth (`--searches guided guided_without_features ...`); and
its own time an evaluation (of the processor, all threads) by genes and evaluations, which `--plot FILE.png` draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from measures import Measures, command_line, shown
from peers import PEERS
from problems import Problem, families, transformer
from rich.console import Console
from rich.table import Table

from jointopt import strategies
from jointopt.objectives import non_dominated
from jointopt.strategies.beliefs import Beliefs
from jointopt.strategies.guided_search import GuidedSearch

MARKS = (25, 50, 100, 200, 400, 500)
BATCHES = {"guided_one_by_one": 1, "optuna_tpe": 1, "optuna_gp": 1, "optuna_nsga2": 1}
"""Evaluations after which a search is told, where it is not STEP. LINAS and pymoo's NSGA-II take theirs whatever is
asked."""
STEP = 5
EVALUATIONS = {"pymoo_nsga2": 500, "optuna_nsga2": 500, "evolutionary": 500, "linas": 300, "optuna_gp": 50}
"""How far a search is followed where it is not as far as guided: the slowest less, those compared at 500 more."""
DEFAULT_SEARCHES = ("guided", "random", "evolutionary", "pymoo_nsga2", "linas", "optuna_nsga2", "optuna_tpe")
SPEED_BLOCKS = (7, 14, 29, 57)
"""Of seven genes each: 49, 98, 203 and 399 genes."""

Keep = Callable[[str, float | str, float | None, str], None]
"""(measure, value, aim, better) of one case."""


class FromTheFront(Beliefs):
    """A batch drawn at random from the predicted front, in place of one picked for what it adds together."""

    def picked(self, found: np.ndarray, n: int, parts: Sequence[Sequence[int]] = ()) -> list[int]:
        front = np.flatnonzero(non_dominated(self.constrained(found)))
        rest = np.setdiff1d(np.arange(len(found)), front)
        return np.concatenate([self.random.permutation(front), self.random.permutation(rest)])[:n].tolist()


def without_batch_choice(problem: Problem, seed: int) -> GuidedSearch:
    search = GuidedSearch(problem.space, problem.objectives, seed)
    search.beliefs = FromTheFront
    return search


def without_features(problem: Problem, seed: int) -> GuidedSearch:
    """One number a choice, and nothing that choices have in common."""
    search = GuidedSearch(problem.space, problem.objectives, seed)
    search.choices.groups = {"choice": np.eye(len(search.choices.gene))}
    return search


def without_exact(problem: Problem, seed: int) -> GuidedSearch:
    """Sizes and MACs predicted as the rest."""
    return GuidedSearch(problem.space, [replace(objective, compute=None) for objective in problem.objectives], seed)


def with_prior(problem: Problem, seed: int) -> GuidedSearch:
    """As after a sensitivity analysis: what each choice alone costs the largest genome, times a random factor whose
    logarithm has deviation 1."""
    space, random = problem.space, np.random.default_rng([seed, 2])
    changed = np.repeat(space.largest[None], space.sizes.sum(), axis=0)
    gene = np.repeat(np.arange(len(space)), space.sizes)
    changed[np.arange(len(gene)), gene] = np.concatenate([np.arange(size) for size in space.sizes])
    values = problem.exact(np.vstack([space.largest[None], space.canonical(changed)]))
    estimates = {}
    for at, objective in enumerate(problem.objectives):
        if objective.compute is None:
            effects = objective.sign * (values[1:, at] - values[0, at]) * random.lognormal(0, 1, len(gene))
            estimates[objective.name] = np.split(effects, np.cumsum(space.sizes)[:-1])
    return GuidedSearch(space, problem.objectives, seed, prior=estimates)


def with_sharing(problem: Problem, seed: int) -> GuidedSearch:
    """As `jointopt.search` has it where blocks can be shared: batches picked for what they add in their time."""
    return GuidedSearch(problem.space, problem.objectives, seed, parts=problem.parts)


ABLATIONS = {
    "guided_without_features": without_features,
    "guided_without_batch_choice": without_batch_choice,
    "guided_without_exact": without_exact,
    "guided_with_prior": with_prior,
    "guided_with_sharing": with_sharing,
}


def makers() -> dict[str, Callable]:
    """name -> (problem, seed) -> something with ask and tell."""

    def own(name: str) -> Callable:
        return lambda problem, seed: strategies.create(name, problem.space, problem.objectives, seed=seed)

    def peer(make: Callable) -> Callable:
        return lambda problem, seed: make(problem.space, problem.objectives, seed)

    found = {name: own(name) for name in strategies.STRATEGIES}
    found["guided_one_by_one"] = found["guided"]
    return found | {name: peer(make) for name, make in PEERS.items()} | ABLATIONS


def followed(problem: Problem, make: Callable, seed: int, evaluations: int, batch: int) -> tuple[np.ndarray, list]:
    """Noise-free values of what was evaluated, in order [evaluations, objectives]; after each batch, how many there
    were and the processor's seconds that the search itself had taken."""
    random = np.random.default_rng([seed, 1])
    started = time.process_time()
    search = make(problem, seed)
    own, values, clock = time.process_time() - started, np.empty((0, len(problem.objectives))), []
    while len(values) < evaluations:
        started = time.process_time()
        genomes = search.ask(min(batch, evaluations - len(values)))
        own += time.process_time() - started
        exact = problem.exact(genomes)
        values = np.vstack([values, exact])
        started = time.process_time()
        search.tell(genomes, problem.noise(exact, random))
        own += time.process_time() - started
        clock.append((len(values), own))
    return values[:evaluations], clock


def volumes(problem: Problem, name: str, seeds: int, evaluations: int, minutes: float) -> tuple[np.ndarray, float]:
    """Hypervolume after each STEP evaluations [seeds, evaluations / STEP]; seconds an evaluation, the median."""
    curves, times, ends = [], [], time.monotonic() + 60 * minutes
    for seed in range(seeds):
        values, clock = followed(problem, makers()[name], seed, evaluations, BATCHES.get(name, STEP))
        curves.append([problem.volume(values[:count]) for count in range(STEP, evaluations + 1, STEP)])
        times.append(clock[-1][1] / evaluations)
        if time.monotonic() > ends:
            break
    return np.array(curves), float(np.median(times))


def first_with(curve: np.ndarray, level: float) -> int | str:
    """The fewest evaluations, in steps, after which a median curve is at a level."""
    reached = np.flatnonzero(curve >= level)
    return STEP * (int(reached[0]) + 1) if len(reached) else f"over {STEP * len(curve)}"


def after(curves: np.ndarray, evaluations: int) -> np.ndarray:
    """The last axis of curves at so many evaluations."""
    return curves[..., evaluations // STEP - 1]


def compared(
    name: str, problem: Problem, evaluations_of: dict[str, int], seeds: int, minutes: float, keep: Keep
) -> Table:
    """Runs the searches on one problem, and keeps what each has reached."""
    medians = {}
    table = Table(
        title=f"{name}: {len(problem.space)} genes, {len(problem.objectives)} objectives; hypervolume, quartiles"
    )
    for column in ("search", "seeds", *map(str, MARKS), "ms each"):
        table.add_column(column, justify="left" if column == "search" else "right")
    for search, evaluations in evaluations_of.items():
        curves, seconds = volumes(problem, search, seeds, evaluations, minutes)
        medians[search] = np.median(curves, axis=0)
        cells = []
        for mark in MARKS:
            if mark > evaluations:
                cells.append("")
                continue
            low, middle, high = np.quantile(after(curves, mark), [0.25, 0.5, 0.75])
            cells.append(f"{middle:.3f} [dim]{low:.3f}-{high:.3f}[/]")
            for which, value in (("", middle), (", 1st quartile", low), (", 3rd quartile", high)):
                keep(f"{search}, hypervolume after {mark}{which}", value, None, "higher")
        table.add_row(search, str(len(curves)), *cells, f"{1e3 * seconds:.1f}")
        keep(f"{search}, seeds", len(curves), None, "higher")
        keep(f"{search}, own seconds an evaluation", seconds, None, "lower")
    derived(medians, keep)
    return table


def derived(medians: dict[str, np.ndarray], keep: Keep) -> None:
    """What the curves of one problem say about guided against the others."""
    if "guided" not in medians:
        return
    guided = medians["guided"]
    for own in ("guided", "guided_one_by_one"):
        for peer, count, aim in (
            ("pymoo_nsga2", 500, 25),
            ("optuna_nsga2", 500, 25),
            ("evolutionary", 500, 25),
            ("linas", 300, 50),
        ):
            if {own, peer} <= medians.keys() and STEP * len(medians[peer]) >= count:
                needed = first_with(medians[own], after(medians[peer], count))
                how = "" if own == "guided" else ", one by one"
                keep(f"evaluations for {peer}'s {count}{how}", needed, aim, "lower")
    for peer in ("optuna_tpe", "optuna_gp"):
        if peer in medians:
            marks = [mark for mark in MARKS if mark <= STEP * min(len(guided), len(medians[peer]))]
            lead = float(min(after(guided, mark) - after(medians[peer], mark) for mark in marks))
            keep(f"smallest lead over {peer}", lead, 0.0, "higher")
    for ablated in ABLATIONS.keys() & medians.keys():
        needed = first_with(medians[ablated], after(guided, 50))
        keep(f"evaluations {ablated} needs for guided's 50", needed, None, "lower")


def own_speed(blocks: int, keep: Keep, evaluations: int = 500) -> list:
    """Guided's own time as evaluations come in, batches picked for sharing, and how many genomes its predictors take a
    second in the end."""
    problem = transformer("speed", blocks, 4, interactions=0.2, noise=0.03)
    _, clock = followed(problem, with_sharing, 0, evaluations, STEP)
    for mark in (50, 100, 200, evaluations):
        keep(f"own seconds an evaluation, {mark} evaluations", dict(clock)[mark] / mark, 1.0, "lower")
    search = GuidedSearch(problem.space, problem.objectives)
    genomes = problem.space.sample(evaluations, 0)
    search.tell(genomes, problem.exact(genomes))
    predictors = search.believed(search.told, search.costs()).predictors.values()
    drawn = np.random.default_rng(0).integers(0, problem.space.sizes, (20000, len(problem.space)))
    many = problem.space.canonical(drawn)
    started = time.perf_counter()
    for predictor in predictors:
        predictor(many)
    keep("predictions a second", len(many) / (time.perf_counter() - started), 1e5, "higher")
    return clock


def plot(clocks: dict[int, list], path: Path) -> None:
    """Own seconds of one evaluation as they come in, a line for each number of genes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="evaluations", ylabel="guided's own processor seconds each")
    for genes, clock in clocks.items():
        counts, seconds = np.array(clock).T
        each = np.diff(seconds, prepend=0) / np.diff(counts, prepend=0)
        smooth = np.convolve(each, np.ones(5) / 5, mode="valid")
        axes.plot(counts[4:], smooth, label=f"{genes} genes")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    known = families()
    parser = command_line(__doc__)
    parser.add_argument("--problems", nargs="*", choices=[*known], default=[*known], help="(default all)")
    parser.add_argument("--searches", nargs="+", choices=[*makers()], default=DEFAULT_SEARCHES)
    parser.add_argument("--seeds", type=int, default=10, help="of each search (default 10)")
    parser.add_argument("--evaluations", type=int, default=400, help="of guided, random and TPE (default 400)")
    parser.add_argument("--minutes", type=float, default=10, help="for one search on one problem (default 10)")
    parser.add_argument("--problem-seed", type=int, default=0, help="draws other problems of the same kinds")
    parser.add_argument("--no-speed", action="store_true", help="leave out the run that measures guided's own time")
    parser.add_argument("--plot", type=Path, help="where the figure of guided's own time goes (needs matplotlib)")
    given = parser.parse_args()
    evaluations_of = {search: EVALUATIONS.get(search, given.evaluations) for search in given.searches}
    console, measures = Console(width=160), Measures(given.json)
    for name in given.problems:
        problem, keep = families(given.problem_seed)[name](), partial(measures.keep, name)
        console.print(compared(name, problem, evaluations_of, given.seeds, given.minutes, keep))
    if not given.no_speed:
        clocks = {}
        for blocks in SPEED_BLOCKS:
            clocks[7 * blocks] = own_speed(blocks, partial(measures.keep, f"{7 * blocks} genes"))
        if given.plot:
            plot(clocks, given.plot)
    aims = Table("case", "measure", "value", "aim", title="against the aims")
    for each in measures.rows:
        if each["aim"] is not None or "guided's 50" in each["measure"]:
            aim = "" if each["aim"] is None else f"{each['aim']:g}, {each['better']}"
            aims.add_row(each["case"], each["measure"], shown(each["value"]), aim)
    console.print(aims)


if __name__ == "__main__":
    main()
