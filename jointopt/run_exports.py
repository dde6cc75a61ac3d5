"""The exports of runs: made where nothing else is in the way, and verified by what scored the search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jointopt.config.config import Config
from jointopt.names import NEAREST
from jointopt.prepared import Prepared
from jointopt.run_folder import EXPORT, read_json
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.checkpoint.verification import Verification
    from jointopt.finishing.finishing import Finished
    from jointopt.study.study import Study
    from jointopt.supernet.supernet import Supernet


def export_genome(
    supernet: Supernet,
    study: Study,
    genome: np.ndarray,
    finished: Finished | None,
    folder: Path,
    prepared: Prepared,
    overwrite: bool,
    target: str,
) -> None:
    """Exports a genome, or what finishing made of it, unless the folder holds this very one already, with its scores;
    where only those on unseen data are others, it is written again.

    Raises:
        JointoptError: the folder holds something else and `overwrite` is not set.
    """
    from jointopt.checkpoint.exporting import export, told_apart_by
    from jointopt.study.rescoring import scored_again

    if folder.exists() and not overwrite:
        wanted = {**told_apart_by(supernet, genome, finished, study), "target": target}
        held = _held(folder)
        known = {key: held.get(key) for key in wanted if key != "supernet" or key in held}  # earlier versions lack it
        differing = [key for key, value in known.items() if wanted[key] != value]
        if differing:
            raise _in_the_way(folder, "this model with other scores" if differing == ["metrics"] else "another model")
        if held.get("unseen", {}) == scored_again(study, genome, wanted["rounding"]):
            return
        overwrite = True  # by the very model, whose card tells no scores on today's unseen data
    source = prepared.loaded.source
    export(
        supernet,
        finished or genome,
        folder,
        study=study,
        processor=prepared.loaded.saved_processor,
        base_model=source.location if source.local else source.name,
        overwrite=overwrite,
        target=target,
    )
    if folder.resolve() == (Path(str(study.path)).parent / EXPORT).resolve():
        study.note("verified", None)  # which another model was


def check_export(config: Config, overwrite: bool, supernet: Supernet | None = None) -> None:
    """Refuses, before the search, what is in the export's place and can be none of the run's choices, whichever it is:
    no export, one for another target, or a finished one where the config finishes nothing.

    Args:
        supernet: once it is made; an export of another one is then refused too.
    """
    from jointopt.checkpoint.exporting import check_place

    folder = Path(config.output) / EXPORT
    if overwrite:
        check_place(folder, overwrite)
    elif folder.exists():
        held = _held(folder)
        unfinished = config.finish is None and held.get("rounding") != NEAREST
        other = supernet is not None and "supernet" in held and held["supernet"] != supernet.fingerprint()
        if other:
            raise _in_the_way(folder, "a sub-network of another super-network")
        if held.get("genome") is None or unfinished or held["target"] != config.target:
            raise _in_the_way(folder, "another model")


def _held(folder: Path) -> dict[str, Any]:
    """What is recorded of the export in a folder; nothing but a target where it is none."""
    from jointopt.checkpoint.exporting import RECORD, UNCHANGED

    return {"target": "transformers"} | read_json(folder / RECORD, "export", f"{UNCHANGED}, or --overwrite")


def _in_the_way(folder: Path, held: str) -> JointoptError:
    return JointoptError(f"export: {str(folder)!r} exists and holds {held}; --overwrite replaces it")


def verify_export(folder: Path, prepared: Prepared | None) -> Verification:
    """`jointopt.verify`: reloaded in a process without jointopt on the search's device, scored as there, weighed; and
    its tokenizer or image processor compared with the original's."""
    from jointopt.checkpoint.processors import processor_differences
    from jointopt.checkpoint.verification import verify

    if prepared is None:
        return verify(folder)
    loaded = prepared.loaded
    found = verify(folder, prepared.quality, device=str(next(loaded.model.parameters()).device))
    more = processor_differences(folder, loaded, prepared.inputs, prepared.prepare_inputs)
    return replace(found, differences=(*found.differences, *more))
