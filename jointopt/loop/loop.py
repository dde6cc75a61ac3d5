"""Ask, evaluate, record, tell: the search itself."""

from __future__ import annotations

import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jointopt import strategies
from jointopt.evaluation import workers as workplaces
from jointopt.evaluation.evaluation import Evaluation, Quality, check_supernet
from jointopt.evaluation.sharing import evaluation_order, parts_of
from jointopt.installed import lacking
from jointopt.loop.stopping import Budget, Watch, heeding_ctrl_c
from jointopt.loop.wishes import check_metrics, metrics_of_original, resolved
from jointopt.names import BATCH, MOST
from jointopt.objectives import COSTS, Constraint, Objective, same_values
from jointopt.sensitivity import quality_prior, telling
from jointopt.study.study import Study
from jointopt.supernet.state import notice
from quant.errors import JointoptError, check_count
from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet


def search(
    supernet: Supernet,
    quality: Quality,
    objectives: Sequence[str | Objective | dict[str, str]] = ("quality", "size"),
    evaluations: int | None = None,
    storage: str | Path | None = None,
    seed: int = 0,
    *,
    strategy: str = "guided",
    strategy_options: Mapping[str, Any] | None = None,
    batch: int = BATCH,
    minutes: float | None = None,
    patience: int | None = None,
    workers: int | None = None,
    ray: str | None = None,
    threads: int | None = None,
    asynchronous: bool = False,
    constraints: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = False,
    warm_start: bool = False,
) -> Study:
    """Searches a super-network and records every evaluation.

    Args:
        supernet: calibrated.
        quality: model -> a number, higher is better, which is the metric "quality"; or model -> a mapping of metrics.
            It is for what the model returns: blocks that genomes of a batch have in common are run once for all of
            them, so that a clock in it is no measure of a genome. What one costs is an `Objective` with `compute`.
        objectives: names of metrics ("quality", "accuracy", "loss", "kl", "perplexity", ...), of costs ("size", "macs",
            "bops", "parameters"; of a super-network with a model of latency "latency", "energy", "peak_memory"),
            {name: direction} for a metric of one's own, or `Objective`s: with `compute` of a cost of one's own, by
            another name than those.
        evaluations: how many genomes the study has in the end, those of earlier runs counted (default: 200, or
            without limit where `minutes` or `patience` is given).
        storage: the study's file; one that exists is gone on with. None keeps it in memory.
        seed: of all that is random in the search.
        strategy: "guided", "evolutionary" or "random", with `strategy_options`.
        batch: genomes asked at a time; with workers, some times as many as these are keeps them busy.
        minutes: of wall clock that the study may take, earlier runs counted.
        patience: evaluations in a row without any hypervolume gained, after which the search ends.
        workers: processes on this machine that evaluate, the super-network's weights shared between them. The study
            is the same for any number. `quality` and all it refers to is sent to them, by value where it comes from
            the script itself, else by import; state that it keeps stays in each worker. GPUs are dealt out in turn, all
            that CUDA_VISIBLE_DEVICES names: each worker sees one of them, as cuda:0.
        ray: "auto" or the address of a Ray cluster, on which the workers run (default: as many as there is room for).
        threads: of torch in each evaluation (default: with `workers` or `ray` 1, else torch's setting). They decide
            the last bits of a sum, so that a study keeps to those that it was begun with.
        asynchronous: to ask for a new genome whenever a worker is idle, without waiting for its batch. No worker
            waits then, but what is asked depends on which evaluation ended first: no two such searches are the same.
        constraints: {"size_mb": "<= 20", "accuracy": ">= 0.9"}, limits on costs and on measured objectives, so that
            evaluations go where the choice will be made. Exact ones every genome keeps; `study.best` keeps all.
        config: what else the results depend on (data, model); compared when a study is gone on with.
        progress: whether to show a bar with the time left.
        warm_start: whether "guided" begins with what one pass of gradients tells of each choice
            (`jointopt.sensitivity`). It costs some evaluations' time. Two image classifiers were after 15 about where
            they are after 25 without, a BERT gained nothing (scripts/bench/sensitivity.py): off unless asked for.

    Returns:
        The study, open; `study.stopped` says why it ended. Where the space has fewer genomes than `evaluations`, all
        of them are in it. A study goes on with the same call and a larger budget; one of which every evaluation
        failed is begun anew. Where a new one fails with the original, or its warm start, no study is left.

    Raises:
        JointoptError: a super-network that is not calibrated, an unknown objective or strategy, constraints that no
            genome meets, another config on the same study, a function that failed on every genome of the first batch
            (and on five or more), workers that cannot be started.
    """
    _check_searched(supernet, quality)
    budget = Budget(evaluations, minutes, patience)
    for name, count in (("workers", workers), ("threads", threads), ("batch", batch)):
        check_count(name, count, MOST.get(name, math.inf))
    check_ray("ray", ray)
    original, wanted, limits = resolved(supernet, objectives, constraints or {})
    asking = _strategy(supernet, wanted, limits, strategy, strategy_options or {}, seed, warm_start)
    settings = {"seed": seed, "strategy": strategy, "strategy_options": dict(strategy_options or {}), "batch": batch}
    switches = {"warm_start": warm_start, "asynchronous": asynchronous}
    recorded = _recorded(supernet, settings, switches, limits, config or {})
    study = Study.create(storage, supernet.space, wanted, recorded)
    fresh = not len(study) and study.last_generation() is None
    try:
        threads = _threads(study, threads, workers is not None or ray is not None)
        try:
            with workplaces.threads_of_torch(threads):
                _score_original(study, supernet, quality, wanted, original, budget)
                if warm_start:
                    _take_prior(asking, study, supernet, wanted)
        except Exception:
            if fresh:  # another search would find nothing in it but settings to keep to
                study.remove()
            raise
        own = [each for each in wanted if each.compute is not None and each.name not in COSTS]
        _check_recorded(study, own)
        _begin_anew_if_all_failed(study)
        if (state := study.fact("state")) is not None:
            asking.load_state_dict(state)
        _say_where_small(supernet.space, budget)
        study.note("stopped", None)
        with (
            closing(_evaluator(supernet, quality, workers, ray, threads)) as evaluator,
            heeding_ctrl_c() as check_interrupt,
            Watch(study, budget, progress) as watch,
        ):
            run = _Run(study, asking, evaluator, budget, watch, batch, own, check_interrupt)
            reason = run.stream() if asynchronous else run.batches()
            _stop_if_all_failed(study, 1)
            watch.ended(reason)
        supernet.scores.update(study.scores())
    except BaseException:
        study.close()
        raise
    study.unlock()
    return study


def _check_searched(supernet: Supernet, quality: Quality) -> None:
    check_supernet("search", supernet)
    if not callable(quality):
        raise JointoptError(f"quality: found {quality!r:.60}; allowed: a function of a model")
    notice(supernet)
    if not supernet.calibrated:
        raise JointoptError("search: the super-network is not calibrated; call supernet.calibrate(batches) first")


def _strategy(
    supernet: Supernet,
    wanted: Sequence[Objective],
    limits: Sequence[Constraint],
    name: str,
    options: Mapping[str, Any],
    seed: int,
    warm_start: bool,
) -> strategies.Strategy:
    """What is to ask. What does not fit is refused here, before a study is begun."""
    if not isinstance(options, Mapping):
        raise JointoptError(f"strategy_options: found {options!r}; allowed: a mapping of names to values")
    if warm_start and name != "guided":
        raise JointoptError(f"warm_start: found the {name} strategy, which takes no estimates; allowed: guided")
    if warm_start:
        telling(wanted)
    shared = {"parts": parts_of(supernet)} if name == "guided" else {}
    constrained = {"constraints": limits} if limits else {}
    return strategies.create(name, supernet.space, wanted, seed, **{**shared, **options, **constrained})


def _score_original(
    study: Study,
    supernet: Supernet,
    quality: Quality,
    wanted: Sequence[Objective],
    original: Mapping[str, float],
    budget: Budget,
) -> None:
    """Records what the original costs and scores; of a study that goes on compares it.

    Args:
        original: its costs.
    """
    if not study.original:
        study.note("baselines", {"original": {**original, **metrics_of_original(supernet, quality)}})
    elif len(study) and budget.spent(study, 0.0) is None:
        metrics = metrics_of_original(supernet, quality)
        check_metrics(wanted, metrics)
        _check_goes_on(study, wanted, metrics, "by another quality function or on other data")
        _check_goes_on(study, wanted, original, "another version of jointopt counted it")
    check_metrics(wanted, study.original)
    if study.fact("shapes") is None:
        study.note("shapes", supernet.shapes())


def _check_goes_on(study: Study, wanted: Sequence[Objective], found: Mapping[str, float], why: str) -> None:
    """Warns, with the reason, where an objective of the original is another than when the study was begun."""
    for name in {each.name for each in wanted} & {*found} & {*study.original}:
        before = study.original[name]
        if not np.isclose(found[name], before, rtol=1e-3, atol=1e-6, equal_nan=True):
            warnings.warn(
                f"search: {name} of the original is {found[name]:.6g}, and was {before:.6g} when the study began: "
                f"{why}; what was recorded then stays beside what is recorded now",
                stacklevel=4,
            )


def _check_recorded(study: Study, own: Sequence[Objective]) -> None:
    """Raises JointoptError where a function of the user's is not the one by which the study recorded its objective."""
    if not own or not len(rows := study.succeeded()):
        return
    for each in own:
        found = each.values(np.array(rows["genome"].tolist(), dtype=np.int64))
        known = rows[each.name].to_numpy(dtype=float)
        other = ~same_values(found, known, known)
        if other.any():
            at = int(other.argmax())
            raise JointoptError(
                f"objective {each.name!r}: compute gives {found[at]:.9g} for evaluation {rows['number'].iloc[at]}, for "
                f"which the study has {known[at]:.9g}; allowed: the same function, or another study"
            )


def _recorded(
    supernet: Supernet,
    settings: Mapping[str, Any],
    switches: Mapping[str, bool],
    limits: Sequence[Constraint],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """What a study compares when it is gone on with; what is off or absent is left out."""
    record = {
        **settings,
        "supernet": supernet.fingerprint(),
        **({"latency": supernet.latency.described()} if supernet.latency else {}),
        **{name: True for name, on in switches.items() if on},
        **({"constraints": {each.name: f"{each.relation} {each.limit:.15g}" for each in limits}} if limits else {}),
    }
    if taken := set(config) & {*record, *switches, "constraints", "latency"}:
        raise JointoptError(f"config: found {min(taken)!r}, which every study records itself; allowed: another key")
    return {**record, **config}


def _threads(study: Study, wanted: int | None, parallel: bool) -> int:
    """Of each evaluation: those that the study was begun with."""
    begun = study.fact("threads")
    if begun is None:
        begun = wanted or (1 if parallel else torch.get_num_threads())
        study.note("threads", begun)
    if wanted not in (None, begun):
        raise JointoptError(f"threads: found {wanted}; allowed: {begun}, with which this study was begun")
    return begun


def check_ray(key: str, address: str | None) -> None:
    """Raises JointoptError for a cluster that nothing is installed for."""
    if address is not None and (told := lacking("ray")):
        raise JointoptError(f"{key}: found {address!r}, and {told}")


def _take_prior(asking: strategies.Strategy, study: Study, supernet: Supernet, wanted: Sequence[Objective]) -> None:
    """Tells the strategy `quality_prior`, which is estimated once a study."""
    assert isinstance(asking, strategies.GuidedSearch)
    prior = study.fact("prior")
    if prior is None:
        prior = {name: [each.tolist() for each in found] for name, found in quality_prior(supernet, wanted).items()}
        study.note("prior", prior)
    asking.take_prior(prior)


def _say_where_small(space: SearchSpace, budget: Budget) -> None:
    count = space.count()
    if budget.evaluations is not None and count < budget.evaluations:
        warnings.warn(
            f"evaluations: found {budget.evaluations}, but the space has {count} genomes; all of them are evaluated",
            stacklevel=3,
        )


def _evaluator(
    supernet: Supernet, quality: Quality, workers: int | None, ray: str | None, threads: int
) -> workplaces.Evaluator:
    order = partial(evaluation_order, supernet)
    if ray is not None:
        try:
            from jointopt.evaluation.ray_workers import Cluster
        except ImportError as error:  # it is there, and damaged
            raise JointoptError(f"ray: {error}; allowed: after pip install 'jointopt[ray]'") from None
        cluster = Cluster(ray, supernet, quality, workers, threads)
        return workplaces.Pool(cluster, workers or cluster.room, order)
    if workers is None or workers == 1:
        return workplaces.Serial(supernet, quality, threads)
    return workplaces.Pool(workplaces.Processes(supernet, quality, workers, threads), workers, order)


@dataclass
class _Run:
    """One run of a search: everything that its steps need.

    Attributes:
        own: objectives that a function of the user's computes.
    """

    study: Study
    asking: strategies.Strategy
    evaluator: workplaces.Evaluator
    budget: Budget
    watch: Watch
    batch: int
    own: Sequence[Objective]
    check_interrupt: Callable[[], None]

    def batches(self) -> str:
        """Asks for a batch, evaluates all of it, tells it, and so on. Returns why it ended."""
        generation = self.study.last_generation()
        for earlier in self.study.generations()[:-1]:
            self._evaluate(*earlier)  # nothing, unless someone has taken evaluations out of the study
        while True:
            if generation is not None:
                self._evaluate(*generation)
                self._tell(generation[1])
                _stop_if_all_failed(self.study, max(self.batch, BATCH))
            if (reason := self.budget.spent(self.study, self.watch.elapsed())) is not None:
                return reason
            generation = self._ask(self.batch)
            if generation is None:
                return f"space: all {len(self.study)} genomes that can be asked for are evaluated"

    def stream(self) -> str:
        """Asks for a genome whenever one can be evaluated, whichever have ended by then. Returns why it ended."""
        waiting: deque[tuple[int, int, np.ndarray]] = deque()
        told = {genome.tobytes() for genome in self.asking.told}
        for generation, genomes in self.study.generations():
            waiting.extend(self._unevaluated(generation, genomes))
            known = self.study.results(genomes)
            fresh = [r is not None and g.tobytes() not in told for g, r in zip(genomes, known, strict=True)]
            self._tell(genomes[fresh])
        running: dict[int, tuple[int, np.ndarray]] = {}
        while True:
            reason = self.budget.spent(self.study, self.watch.elapsed())
            if not waiting and reason is None and (free := self._free(len(running))):
                asked = self._ask(free)
                waiting.extend(self._unevaluated(*asked) if asked else ())
                if not asked and not running:
                    return f"space: all {len(self.study)} genomes that can be asked for are evaluated"
            while waiting and len(running) < self.evaluator.count:
                number, generation, genome = waiting.popleft()
                running[number] = (generation, genome)
                self.evaluator.submit([number], genome[None])
            if not running or self.watch.seconds_left() == 0:
                return self.budget.spent(self.study, self.watch.elapsed()) or "evaluations: no more allowed"
            for number, result in self.evaluator.collect(self.watch.seconds_left()):
                generation, genome = running.pop(number)
                self._record(number, generation, genome, result)
                self._tell(genome[None])
            _stop_if_all_failed(self.study, max(self.batch, BATCH))

    def _free(self, running: int) -> int:
        """How many genomes may be asked for."""
        free = self.evaluator.count - running
        if self.budget.evaluations is None:
            return free
        return min(free, self.budget.evaluations - len(self.study) - running)

    def _ask(self, count: int) -> tuple[int, np.ndarray] | None:
        """A new batch, recorded; None where the strategy has no more."""
        genomes = self.asking.ask(count)
        if not len(genomes):
            return None
        number = self.study.add_generation(genomes, self.asking.predicted, self.asking.state_dict())
        self.watch.asked(self.asking.predicted)
        return number, genomes

    def _unevaluated(self, generation: int, genomes: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """(number, generation, genome) of those that the budget allows and that are not in the study."""
        first, limit = self.study.first_number(generation), self.budget.evaluations
        results = zip(range(first, first + len(genomes)), genomes, self.study.results(genomes), strict=True)
        return [(n, generation, g) for n, g, known in results if known is None and (limit is None or n <= limit)]

    def _evaluate(self, generation: int, genomes: np.ndarray) -> None:
        """All of a batch, unless the time is over before."""
        left = {number: genome for number, _, genome in self._unevaluated(generation, genomes)}
        if left:
            self.evaluator.submit(list(left), np.array(list(left.values())))
        while left and self.watch.seconds_left() != 0:
            for number, result in self.evaluator.collect(self.watch.seconds_left()):
                self._record(number, generation, left.pop(number), result)

    def _record(self, number: int, generation: int, genome: np.ndarray, found: Evaluation) -> None:
        elapsed = self.watch.elapsed()
        if found.failed is None and self.own:
            computed = {each.name: float(each.values(genome[None])[0]) for each in self.own}
            found = replace(found, metrics={**(found.metrics or {}), **computed})
        lacking = [each.name for each in self.study.objectives if each.name not in (found.metrics or {})]
        if lacking and found.failed is None:
            found = replace(found, metrics=None, failed=f"quality returned no {lacking[0]!r}")
        self.study.add_evaluation(
            generation, genome, found.metrics, found.failed, found.seconds, number=number, elapsed=elapsed
        )
        self.watch.advanced()
        self.check_interrupt()

    def _tell(self, genomes: np.ndarray) -> None:
        """Tells all of these at once; a batch that the budget cut short is told by the run that completes it."""
        results = self.study.results(genomes)
        if not len(genomes) or any(result is None for result in results):
            return
        names = [objective.name for objective in self.study.objectives]
        values = [[(result or {}).get(name, np.nan) for name in names] for result in results]
        self.asking.tell(genomes, np.array(values, dtype=float))


def _begin_anew_if_all_failed(study: Study) -> None:
    """What failed in all earlier runs, as a function does that cannot find its data, says nothing of the genomes."""
    if told := _all_failed(study, 1):
        study.begin_anew()
        warnings.warn(f"study: {told}; all of them are evaluated again", stacklevel=3)


def _stop_if_all_failed(study: Study, fewest: int) -> None:
    if told := _all_failed(study, fewest):
        raise JointoptError(f"quality: {told}")


def _all_failed(study: Study, fewest: int) -> str | None:
    """What is to be said where all evaluations failed; None where one succeeded, or there are not `fewest` yet."""
    if len(study) < fewest or not study.all_failed():
        return None
    frame = study.evaluations()
    reason, count = Counter(frame["failed"]).most_common(1)[0]
    return f"all {len(frame)} evaluations failed, {count} of them with {reason}"
