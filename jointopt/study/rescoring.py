"""The front scored again, on data that the search never saw: what was picked for its score is flattered by that score.

rescore_front(supernet, study, quality)
study.fact("unseen")     # [{"genome": [...], "metrics": {...}, "errors": {...}}, ...]; the original's genome is None

What finishing made of a genome is another record, which has its "rounding" too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jointopt.evaluation.evaluation import Quality, measured
from jointopt.evaluation.sharing import SharedEvaluator
from jointopt.names import NEAREST
from jointopt.objectives import COSTS
from jointopt.study.study import Study
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.finishing.finishing import Finished
    from jointopt.supernet.supernet import Supernet

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
        _note(study, {"genome": None, "metrics": dict(found), "errors": found.errors})
    front = study.front()
    genomes = [genome for genome in (front["genome"] if len(front) else ()) if genome not in known]
    if not genomes:
        return
    for index, result in SharedEvaluator(supernet, quality).evaluate(np.array(genomes, dtype=np.int64)):
        metrics = {name: value for name, value in (result.metrics or {}).items() if name not in COSTS}
        record = {"genome": list(genomes[index]), "metrics": metrics, "errors": result.errors}
        _note(study, record if result.failed is None else {**record, "failed": result.failed})


def rescore_finished(study: Study, finished: Finished, quality: Quality) -> None:
    """Measures what finishing made of a genome by `quality`, unless the study has it already."""
    key = tuple(finished.genome.tolist()), finished.rounding
    if key not in rescored_finished(study):
        record: dict[str, Any] = {"genome": list(key[0]), "rounding": key[1], "metrics": {}, "errors": {}}
        try:
            found = measured(quality, finished.model)
        except JointoptError as error:  # such as of a loss that is no number, which must not cost the export
            _note(study, {**record, "failed": str(error)})
        else:
            _note(study, {**record, "metrics": dict(found), "errors": found.errors})


def forget(study: Study, source: Any = None) -> None:
    """Leaves the study without scores on unseen data, or with room for those on another source."""
    study.note("unseen", [])
    study.note("unseen_source", source)


def rescored(study: Study) -> dict[Genome | None, dict[str, Any]]:
    """Genome (None for the original) -> "metrics" and their standard "errors", of what was scored again as searched."""
    return {genome: record for (genome, rounding), record in _records(study).items() if rounding is None}


def rescored_finished(study: Study) -> dict[tuple[Genome, str], dict[str, Any]]:
    """The same of what was finished: genome and rounding -> "metrics" and "errors"."""
    return {(genome, rounding): record for (genome, rounding), record in _records(study).items() if genome and rounding}


def scored_again(study: Study, genome: np.ndarray, rounding: str) -> dict[str, dict[str, float]]:
    """The "metrics" on unseen data of a genome, finished by a rounding or as searched, and those of the "original"; {}
    where there are none."""
    key, searched = tuple(genome.tolist()), rescored(study)
    found = searched.get(key) if rounding == NEAREST else rescored_finished(study).get((key, rounding))
    if not found or not found["metrics"]:
        return {}
    return {"metrics": found["metrics"], "original": searched.get(None, {}).get("metrics", {})}


def _records(study: Study) -> dict[tuple[Genome | None, str | None], dict[str, Any]]:
    return {
        (None if (g := each["genome"]) is None else tuple(g), each.get("rounding")): each
        for each in study.fact("unseen", [])
    }


def _note(study: Study, record: Mapping[str, Any]) -> None:
    study.note("unseen", [*study.fact("unseen", []), dict(record)])
