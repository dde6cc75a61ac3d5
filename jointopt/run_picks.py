"""The export of any point of a run's study, whatever the run's own choice is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jointopt.config.config import load_config
from jointopt.prepared import prepare, stay_offline
from jointopt.run_exports import export_genome
from jointopt.run_folder import CONFIG, EXPORT, STUDY
from jointopt.study.study import Study
from jointopt.workflow import finished_genome, finishing_of, make_supernet, note_choice
from quant.errors import JointoptError


def export_pick(output: Path, pick: Mapping[str, Any], to: Path | None, target: str | None, overwrite: bool) -> Path:
    """Exports a point of the study in a run's output folder, finished as the run's config says.

    Args:
        pick: keywords of `Study.best`, or "evaluation" and its number.
        to: the folder to be made; None is the run's own, of which this is then the choice.
        target: None is the config's.

    Returns:
        The folder.

    Raises:
        JointoptError: the study has no such point, the folder is there, the model or its data have changed, or what
            `export` raises.
    """
    study = Study.open(output / STUDY)
    try:
        config = load_config(output / CONFIG, {"output": str(output)})
        if not study.finished():  # else it may depend on a finishing, and which that is on the data
            picked(study, pick, None)
        folder = to or output / EXPORT
        if folder.exists() and not overwrite:
            raise JointoptError(f"export: {str(folder)!r} exists; choose another with --to, or give --overwrite")
        stay_offline(config)
        from jointopt.checkpoint.exporting import check_place  # not before the hub is forbidden
        from jointopt.checkpoint.writers import WRITERS

        check_place(folder, overwrite)
        target = target or config.target
        prepared = prepare(config, target)
        genome = picked(study, pick, finishing_of(config, prepared).name if config.finish else None)
        supernet = make_supernet(config, prepared)
        searched = (study.config.get("supernet"), study.config.get("contents"))
        if searched != (supernet.fingerprint(), prepared.searched):
            raise JointoptError(
                f"export: the model or its data are no longer what {str(output / STUDY)!r} searched, or it is another "
                "version of jointopt's"
            )
        if config.finish is not None:  # which takes a while, for what may be refused
            WRITERS[target].check(supernet.extract(genome), prepared.loaded.saved_processor)
        finished = finished_genome(config, supernet, study, genome, prepared)
        export_genome(supernet, study, genome, finished, folder, prepared, overwrite, target)
        if folder.resolve() == (output / EXPORT).resolve():  # only now: what was refused is no choice
            note_choice(study, supernet, genome, pick, finished)
    finally:
        study.close()
    return folder


def picked(study: Study, pick: Mapping[str, Any], rounding: str | None) -> np.ndarray:
    """The genome that a pick names, finished quality by `rounding` counted. Raises JointoptError for none."""
    if "evaluation" not in pick:
        made = any(each["rounding"] == rounding for each in study.finished())
        return study.best(**pick, finished=rounding if made else None)
    frame = study.evaluations()
    rows = frame[frame["number"] == pick["evaluation"]]
    if not len(rows):
        numbers = f"{frame['number'].min()} to {frame['number'].max()}" if len(frame) else "none yet"
        raise JointoptError(f"--pick: found evaluation {pick['evaluation']}; the study has {numbers}")
    row = rows.iloc[0]
    if isinstance(row["failed"], str):
        raise JointoptError(f"--pick: evaluation {pick['evaluation']} failed: {row['failed']}")
    return np.array(row["genome"], dtype=np.int64)
