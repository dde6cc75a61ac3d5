"""The front scored again, on data that the search never saw: what was picked for its score is flattered by that score.

rescore_front(supernet, study, quality)
study.fact("unseen")     # [{"genome": [...], "metrics": {...}, "errors": {...}}, ...]; the original's genome is None
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jointopt.evaluation import Quality, measured
from jointopt.objectives import COSTS
from jointopt.sharing import SharedEvaluator
from jointopt.study import Study
from jointopt.study_file import damaged

if TYPE_CHECKING:
    from jointopt.supernet import Supernet

Genome = tuple[int, ...]


def rescore_front(supernet: Supernet, study: Study, quality: Quality, source: Any = None) -> None:
    """Measures the original and the sub-networks of the front by `quality`, whose data is other than the search's.

    Args:
        source: what tells this data from other data, as JSON can hold it; scores of another are forgotten.

    The study holds the results as its fact "unseen"; what is there already is not measured again. One that fails has
    its reason under "failed" and no metrics.
    """
    if study.fact("unseen_source") != source:
        forget(study, source)
    known = rescored(study)
    if None not in known:
        with supernet.original() as model:
            found = measured(quality, model)
        _note(study, known, None, {"metrics": dict(found), "errors": found.errors})
    front = study.front()
    genomes = [genome for genome in (front["genome"] if len(front) else ()) if genome not in known]
    if not genomes:
        return
    for index, result in SharedEvaluator(supernet, quality).evaluate(np.array(genomes, dtype=np.int64)):
        metrics = {name: value for name, value in (result.metrics or {}).items() if name not in COSTS}
        record = {"metrics": metrics, "errors": result.errors}
        _note(study, known, genomes[index], record if result.failed is None else {**record, "failed": result.failed})


def forget(study: Study, source: Any = None) -> None:
    """Leaves the study without scores on unseen data, or with room for those on another source."""
    study.note("unseen", [])
    study.note("unseen_source", source)


def rescored(study: Study) -> dict[Genome | None, dict[str, Any]]:
    """Genome (None for the original) -> "metrics" and their standard "errors", of what was scored again."""
    with damaged(study.path, "a score on unseen data"):
        return {None if (g := each["genome"]) is None else tuple(g): each for each in study.fact("unseen", [])}


def _note(study: Study, known: dict, genome: Genome | None, record: Mapping[str, Any]) -> None:
    known[genome] = {"genome": None if genome is None else list(genome), **record}
    study.note("unseen", list(known.values()))
