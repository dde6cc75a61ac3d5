"""Ask, evaluate, record, tell: the search itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jointopt import strategies
from jointopt.evaluation import Quality, evaluate, measured
from jointopt.objectives import COSTS, Objective, named
from jointopt.sensitivity import quality_prior
from jointopt.study import Study
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.supernet import Supernet

BATCH = 10


def search(
    supernet: Supernet,
    quality: Quality,
    objectives: Sequence[str | Objective | dict[str, str]] = ("quality", "size"),
    evaluations: int = 200,
    storage: str | Path | None = None,
    seed: int = 0,
    *,
    strategy: str = "guided",
    strategy_options: Mapping[str, Any] | None = None,
    batch: int = BATCH,
    config: Mapping[str, Any] | None = None,
    progress: bool = False,
    warm_start: bool = False,
) -> Study:
    """Searches a super-network and records every evaluation.

    Args:
        supernet: calibrated.
        quality: model -> a number, higher is better, which is the metric "quality"; or model -> a mapping of metrics.
        objectives: names of metrics ("quality", "accuracy", "loss", "kl", "perplexity"), of costs ("size", "macs",
            "bops", "parameters"), {name: direction} for a metric of one's own, or `Objective`s.
        evaluations: how many genomes the study has in the end, those of earlier runs counted.
        storage: the study's file; one that exists is gone on with. None keeps it in memory.
        seed: of all that is random in the search.
        strategy: "guided", "evolutionary" or "random", with `strategy_options`.
        batch: genomes asked at a time.
        config: what else the results depend on (data, model); compared when a study is gone on with.
        progress: whether to show a bar with the time left.
        warm_start: whether "guided" begins with what one pass of gradients tells of each choice
            (`jointopt.sensitivity`). It costs some evaluations' time. Two image classifiers were after 15 about where
            they are after 25 without, a BERT gained nothing (scripts/bench/sensitivity.py): off unless asked for.

    Returns:
        The study, open. Where the space has fewer genomes than `evaluations`, all of them are in it.

    Raises:
        JointoptError: a super-network that is not calibrated, an unknown objective or strategy, another config on the
            same study, or a function that failed on every genome of the first batch.
    """
    if not supernet.calibrated:
        raise JointoptError("search: the super-network is not calibrated; call supernet.calibrate(batches) first")
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise JointoptError(f"evaluations: found {evaluations!r}; allowed: a number from 1")
    wanted = _objectives(supernet, objectives)
    space = supernet.space
    if warm_start and strategy != "guided":
        raise JointoptError(f"warm_start: found the {strategy} strategy, which takes no estimates; allowed: guided")
    prior = {"prior": quality_prior(supernet, wanted)} if warm_start else {}
    asking = strategies.create(strategy, space, wanted, seed=seed, **{**(strategy_options or {}), **prior})
    record = {
        "seed": seed,
        "strategy": strategy,
        "strategy_options": dict(strategy_options or {}),
        "batch": batch,
        "supernet": supernet.fingerprint(),
        **({"warm_start": True} if warm_start else {}),
        **(config or {}),
    }
    study = Study.create(storage, space, wanted, record)
    try:
        if not study.baselines:
            study.note("baselines", {"original": _original(supernet, quality)})
        _check_metrics(wanted, study.baselines["original"])
        if (state := study.fact("state")) is not None:
            asking.load_state_dict(state)
        _run(study, supernet, quality, wanted, asking, evaluations, batch, progress)
        supernet.scores.update(study.scores())
    except BaseException:
        study.close()
        raise
    return study


def _objectives(supernet: Supernet, objectives: Sequence[Any]) -> list[Objective]:
    if isinstance(objectives, str) or not objectives:
        raise JointoptError(f"objectives: found {objectives!r}; allowed: a list of one or more")
    found = [named(objective) for objective in objectives]
    if len({objective.name for objective in found}) < len(found):
        raise JointoptError(f"objectives: found one twice in {', '.join(o.name for o in found)}")

    def column(name: str):
        if name not in known:
            raise JointoptError(f"objective {name!r}: found no cache in this model; allowed costs: {', '.join(known)}")
        return lambda genomes: supernet.cost_columns(genomes)[name]

    known = supernet.original_costs()

    return [replace(o, compute=column(o.name)) if o.name in COSTS and o.compute is None else o for o in found]


def _original(supernet: Supernet, quality: Quality) -> dict[str, float]:
    """Metrics and costs of the model as it was given. What the user's function raises here is raised."""
    with supernet.original() as model:
        metrics = measured(quality, model)
    return {**{name: float(value) for name, value in supernet.original_costs().items()}, **metrics}


def _check_metrics(objectives: Sequence[Objective], metrics: Mapping[str, float]) -> None:
    for objective in objectives:
        if objective.compute is None and objective.name not in metrics:
            returned = [name for name in metrics if name not in COSTS]
            raise JointoptError(f"objective {objective.name!r}: the quality function returns {', '.join(returned)}")


def _run(
    study: Study,
    supernet: Supernet,
    quality: Quality,
    objectives: Sequence[Objective],
    asking: strategies.Strategy,
    evaluations: int,
    batch: int,
    progress: bool,
) -> None:
    columns = (TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        shown = bar.add_task("search", total=evaluations, completed=len(study))
        generation = study.last_generation()
        while True:
            if generation is not None:
                _evaluate_generation(study, supernet, quality, generation, evaluations, lambda: bar.advance(shown))
                _tell(study, asking, objectives, generation[1], evaluations)
                _stop_if_all_failed(study)
            if len(study) >= evaluations:
                return
            genomes = asking.ask(batch)
            if not len(genomes):
                return
            number = study.add_generation(genomes, asking.predicted, asking.state_dict())
            generation = (number, genomes)


def _evaluate_generation(study, supernet, quality, generation, evaluations, advance) -> None:
    number, genomes = generation
    for genome, known in zip(genomes, study.results(genomes), strict=True):
        if known is None and len(study) < evaluations:
            result = evaluate(supernet, genome, quality)
            study.add_evaluation(number, genome, result.metrics, result.failed, result.seconds)
            advance()


def _tell(
    study: Study, asking: strategies.Strategy, objectives: Sequence[Objective], genomes: np.ndarray, evaluations: int
) -> None:
    """Tells a whole batch at once; one that `evaluations` cut short is told by the run that completes it."""
    results = study.results(genomes)
    if any(result is None for result in results):
        return
    values = [[(result or {}).get(objective.name, np.nan) for objective in objectives] for result in results]
    asking.tell(genomes, np.array(values, dtype=float))


def _stop_if_all_failed(study: Study) -> None:
    frame = study.evaluations()
    if len(frame) and frame["failed"].notna().all():
        reason, count = Counter(frame["failed"]).most_common(1)[0]
        raise JointoptError(f"quality: all {len(frame)} evaluations failed, {count} of them with {reason}")
