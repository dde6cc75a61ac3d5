"""From a config to a verified export: what `jointopt run` does, in an output folder that a later run goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jointopt.config.config import Config
from jointopt.digests import digest_of
from jointopt.files import write_whole
from jointopt.names import NEAREST
from jointopt.prepared import Prepared, prepare, stay_offline
from jointopt.run_exports import check_export, export_genome, verify_export
from jointopt.run_folder import (
    CHECKPOINT,
    EXPORT,
    REPORT,
    STUDY,
    TRAINED,
    WEIGHTS,
    check_output,
    read_json,
    study_says,
    taken,
)
from jointopt.timing.hardware import check_timed, latency_of, look_up, measured_beside
from quant.errors import JointoptError, said_of

if TYPE_CHECKING:
    from rich.console import Console

    from jointopt.checkpoint.verification import Verification
    from jointopt.finishing.finishing import Finished, Finishing
    from jointopt.study.study import Study
    from jointopt.supernet.supernet import Supernet
    from jointopt.training.loop import Batches


def make_supernet(config: Config, prepared: Prepared, console: Console | None = None) -> Supernet:
    """The calibrated super-network, trained if the config says so: now, or by an earlier run in the same output.

    Args:
        console: where progress is shown; None trains nothing, and what was not trained is refused.
    """
    from jointopt.supernet.supernet import Supernet

    model = prepared.loaded.model
    space = config.search_space(model)
    if space.count() == 1:
        raise JointoptError("space: holds one genome, so there is nothing to search; allowed: two or more")
    supernet = Supernet(
        model,
        space,
        weight_calibration=config.weight_calibration,
        repair=config.repair,
        activation_calibration=config.activation_calibration,
        transforms=config.transforms or (),
        latency=latency_of(config),
    )
    if config.train is not None:
        _take_weights(config, prepared, supernet, console)
    supernet.calibrate(prepared.inputs)
    if config.train is None and config.hardware is not None and config.hardware.is_this_machine:
        _check_wishes(config, prepared, supernet)
    _take_shapes(config, supernet)
    look_up(config, prepared.inputs, supernet)
    return supernet


def empty_supernet(config: Config) -> Supernet:
    """The config's super-network on the meta device: for its space and its costs."""
    from jointopt.models import empty_model, find_source, model_task
    from jointopt.supernet.supernet import Supernet

    source = find_source(config.model)
    model = empty_model(source, config.task or model_task(source), config.dtype)
    space = config.search_space(model)
    return Supernet(model, space, transforms=config.transforms or (), latency=latency_of(config))


def _take_weights(config: Config, prepared: Prepared, supernet: Supernet, console: Console | None) -> None:
    """Trained ones: those of an earlier run in the same output, or trained now; calibrate afterwards."""
    output = Path(config.output)
    wanted = {**config.training_record(), "contents": _trained_from(config, prepared, console is not None)}
    if _trained_before(config, wanted):
        supernet.load(output / WEIGHTS)
    elif console is None:
        raise JointoptError(f"output: {config.output!r} holds no trained super-network of this config; run it first")
    else:
        supernet.calibrate(prepared.inputs)
        _check_wishes(config, prepared, supernet)
        _train(config, prepared, supernet, wanted["contents"], console)
        _keep(output, supernet, wanted)
    (output / CHECKPOINT).unlink(missing_ok=True)


def _trained_before(config: Config, wanted: Mapping[str, Any]) -> bool:
    """Whether an earlier run has trained this super-network in the same output.

    Raises:
        JointoptError: it was trained with other contents, or the file that says with what is damaged.
    """
    there = read_json(Path(config.output) / TRAINED, "output", "what an earlier run wrote, or none, to train anew")
    if there == wanted:
        return True
    if {**there, "contents": None} != {**wanted, "contents": None}:
        return False
    earlier = there["contents"] or {}
    known = {key: value for key, value in wanted["contents"].items() if key in earlier}
    key = next((key for key, value in known.items() if value != earlier[key]), None)
    if key is None:  # a teacher that is gone, or was not recorded
        return True
    raise JointoptError(
        f"{key}: has other contents than the super-network in {config.output!r} was trained with, or another version "
        "of jointopt has trained it; allowed: those, or another output"
    )


def _take_shapes(config: Config, supernet: Supernet) -> None:
    """Counts positions as the study that goes on did, so that its costs stay of one kind."""
    shapes = study_says(config.output, lambda study: study.last_generation() and study.fact("shapes"), None)
    own = supernet.shapes() if shapes else {}
    if shapes and shapes.get("leaving") == own["leaving"] and shapes["positions"].keys() == own["positions"].keys():
        supernet.take_shapes(shapes)


def _trained_from(config: Config, prepared: Prepared, with_teacher: bool) -> dict[str, str]:
    """Key of the config -> digest of what it names: all that training depends on. Without a teacher that cannot be
    loaded, which training says and all else does without.

    Args:
        with_teacher: whether a teacher is looked at, without whom what was trained can be exported.
    """
    from jointopt.training.configured import TEACHER, teacher_of

    found = {
        "model": digest_of([prepared.loaded.model.state_dict()]),
        "data.train": prepared.trained_on,
        "data.calibrate": prepared.contents["calibrate"],
    }
    with suppress(JointoptError):
        teacher = teacher_of(config, prepared.loaded.task, "cpu") if with_teacher else None
        if teacher is not None:
            found[TEACHER] = digest_of([teacher.model.state_dict()])
    return found


def _check_wishes(config: Config, prepared: Prepared, supernet: Supernet) -> None:
    """What the search would refuse, before training and timing. One that goes on scores the original again anyway."""
    from jointopt.loop.wishes import check_wishes
    from jointopt.objectives import ON_HARDWARE

    _check_choice(config, supernet)
    check_timed(config, supernet)
    scored = study_says(config.output, lambda study: bool(study.original), False)
    timed_later = ON_HARDWARE if supernet.latency is None else ()
    check_wishes(
        supernet,
        [{name: direction} for name, direction in prepared.objectives.items() if name not in timed_later] or ["size"],
        {name: limit for name, limit in (config.constraints or {}).items() if name not in timed_later},
        prepared.quality if config.quality and not scored else None,
        config.search.warm_start,
    )


def _check_choice(config: Config, supernet: Supernet) -> None:
    from jointopt.loop.wishes import check_size

    if config.choose.size_mb is not None:
        check_size(supernet, config.choose.size_mb)


def _train(
    config: Config, prepared: Prepared, supernet: Supernet, contents: Mapping[str, str], console: Console
) -> None:
    from jointopt.training.configured import lora_of, recipe_of
    from jointopt.training.loop import train_supernet

    assert config.train is not None and prepared.train is not None
    samples, size, seed = prepared.train, config.train.batch_size, config.search.seed
    steps = config.train.steps or math.ceil((config.train.epochs or 1) * max(1, samples.count // size))
    recipe, lora = recipe_of(config, supernet, prepared.loaded), lora_of(config, supernet, prepared.loaded)
    if not (Path(config.output) / CHECKPOINT).exists():
        _check_readable(prepared, steps * size, seed, console)
    train_supernet(
        supernet,
        lambda epoch: samples.epoch(epoch, size, seed),
        steps,
        recipe=recipe,
        learning_rate=config.train.learning_rate,
        seed=seed,
        sort_every=config.train.sort_every,
        lora=lora,
        checkpoint=Path(config.output) / CHECKPOINT,
        config=contents,
        progress=True,
    )


def _keep(output: Path, supernet: Supernet, wanted: Mapping[str, Any]) -> None:
    """Weights first, then the file that vouches for them."""
    with said_of("output"):
        supernet.save(output / WEIGHTS)
    write_whole(output / TRAINED, json.dumps(wanted, indent=1), "output")


def run(config: Config, console: Console, overwrite: bool = False) -> Verification:
    """The whole of a config: train, search, choose, export, verify, report. What an earlier run did is not done again,
    and no other run works in the folder meanwhile.

    Args:
        overwrite: whether an export of another genome in the output folder is replaced.

    Raises:
        JointoptError: anything that does not fit, said before the search where it can be known before.
    """
    from jointopt.loop.loop import check_ray

    check_output(config)
    check_ray("search.ray", config.search.ray)
    stay_offline(config)
    check_export(config, overwrite)
    console.print(f"model {config.model}", highlight=False)
    prepared = prepare(config)
    with taken(config):
        return _run(config, prepared, console, overwrite)


def _run(config: Config, prepared: Prepared, console: Console, overwrite: bool) -> Verification:
    from jointopt.report.page import write_report
    from jointopt.report.quantities import counted

    output = Path(config.output)
    supernet = make_supernet(config, prepared, console)
    check_export(config, overwrite, supernet)
    _check_choice(config, supernet)
    space = supernet.space
    console.print(
        f"{supernet.family.name}: {len(space)} genes, {counted(space.count())} genomes; searching in {output / STUDY}",
        highlight=False,
    )
    if config.finish is not None and config.finish.steps is not None and not (output / STUDY).exists():
        _check_readable(prepared, config.finish.steps * config.finish.batch_size, config.search.seed, console)
    study = _searched(config, prepared, supernet)
    try:
        try:
            genome, finished = _chosen_and_finished(config, prepared, supernet, study, console)
        finally:
            write_report(study, output / REPORT)  # there even where nothing can be chosen, or the export is refused
            console.print(f"report: {output / REPORT}", highlight=False)
        export_genome(supernet, study, genome, finished, output / EXPORT, prepared, overwrite, config.target)
        # Only now: what was refused is no choice.
        note_choice(study, supernet, genome, config.choose.model_dump(exclude_none=True), finished)
        try:
            verification = verify_export(output / EXPORT, prepared)
            study.note("verified", "verified" if verification.ok else "differs")
            if config.hardware is not None and config.hardware.is_this_machine:
                line = measured_beside(config, prepared.inputs, supernet, study, genome, output / EXPORT)
                console.print(line, highlight=False, soft_wrap=True)
        finally:
            write_report(study, output / REPORT)  # with the choice, even where it could not be verified
        console.print(f"export: {output / EXPORT}", highlight=False)
        console.print(verdict(verification, study, output / EXPORT), highlight=False, soft_wrap=True)
    finally:
        study.close()
    return verification


def _check_readable(prepared: Prepared, drawn: int, seed: int, console: Console) -> None:
    """Reads what training will draw once, before its first step: a damaged file would end it when it comes to it, for
    good, as a training that goes on has to be on the same data.

    Raises:
        JointoptError: a sample that cannot be read.
    """
    from rich.progress import track

    samples = prepared.train
    assert samples is not None
    if samples.read_late:
        for index in track(samples.shuffled(0, seed)[:drawn], "reading images", console=console, transient=True):
            samples.collate([index])


def _searched(config: Config, prepared: Prepared, supernet: Supernet) -> Study:
    from jointopt.loop.loop import search

    record = {k: v for k, v in config.record().items() if k not in ("search", "objectives", "constraints")}
    return search(
        supernet,
        prepared.quality,
        [{name: direction} for name, direction in prepared.objectives.items()],
        storage=Path(config.output) / STUDY,
        constraints=config.constraints,
        config=record | {"contents": prepared.searched},
        progress=True,
        **config.search.model_dump(),
    )


def _chosen_and_finished(
    config: Config, prepared: Prepared, supernet: Supernet, study: Study, console: Console
) -> tuple[np.ndarray, Finished | None]:
    """The genome that the config asks for, and what finishing made of it; the front is shown, with unseen data."""
    from jointopt.finishing.finishing import finish_top
    from jointopt.report.terminal import finished_table, front_table
    from jointopt.study.rescoring import forget, rescore_finished, rescore_front

    wanted = config.choose.model_dump(exclude_none=True)
    if prepared.unseen is None:
        forget(study)  # scores on data that the config named before
    else:
        rescore_front(supernet, study, prepared.unseen, prepared.contents["test"])
    genome = None
    try:
        genome = _chosen(study, wanted)
    finally:
        console.print(front_table(study, genome))  # what there is to pick from, even where nothing fits
    if config.finish is None:
        return genome, None
    genome, finished = finish_top(
        supernet,
        study,
        _finishing_batches(config, prepared),
        prepared.quality,
        wanted,
        finishing_of(config, prepared),
        config.finish.top,
        lambda line: console.print(line, highlight=False),
    )
    if finished is not None and prepared.unseen is not None:
        rescore_finished(study, finished, prepared.unseen)
    console.print(finished_table(study, genome, finished.rounding if finished else NEAREST))
    return genome, finished


def _chosen(study: Study, wanted: Mapping[str, Any]) -> np.ndarray:
    """`Study.best`; where nothing fits, it is said what else can be done with what was searched."""
    try:
        return study.best(**wanted)
    except JointoptError as error:
        if study.succeeded().empty:  # of a search by minutes alone: all other ends are of an evaluation
            further = f"{study.stopped}, and with more of them the same command goes on"
        else:
            further = "export --pick NUMBER takes any evaluation"
        raise JointoptError(f"{error}; {further}") from None


def note_choice(
    study: Study, supernet: Supernet, genome: np.ndarray, wanted: Mapping[str, Any], finished: Finished | None
) -> None:
    """Records the chosen genome in the study, with what the report draws of it."""
    rounding = finished.rounding if finished else NEAREST
    layers = {"layers": supernet.layout(genome), "full_layers": supernet.original_layout()}
    spent = {"spent": supernet.breakdown(genome), "full_spent": supernet.original_breakdown()}
    study.note("choice", {"genome": genome.tolist(), "wanted": dict(wanted), "rounding": rounding, **layers, **spent})


def finished_genome(
    config: Config, supernet: Supernet, study: Study, genome: np.ndarray, prepared: Prepared
) -> Finished | None:
    """What the config's finishing makes of a genome; None where it has none, or it is no better."""
    from jointopt.finishing.finishing import better_finished, finish_recorded

    if config.finish is None:
        return None
    how, batches = finishing_of(config, prepared), _finishing_batches(config, prepared)
    kept = finish_recorded(supernet, study, genome, batches, prepared.quality, how)
    return better_finished(supernet, study, genome, batches, how, kept)


def finishing_of(config: Config, prepared: Prepared) -> Finishing:
    """What the config's `finish:` says, which is there; of other training data under the same name it is another."""
    from jointopt.finishing.finishing import Finishing

    assert config.finish is not None
    wanted = config.finish
    rounding, seed, data = wanted.rounding or "gptq", config.search.seed, ""
    if wanted.steps is not None:
        data = f"{config.source('train')} {wanted.batch_size} {prepared.trained_on}"
    return Finishing(rounding, wanted.steps, wanted.learning_rate, seed, wanted.learned_ranges, data)


def _finishing_batches(config: Config, prepared: Prepared) -> Batches:
    """The calibration's to round on, the training data's to train on."""
    if config.finish is None or config.finish.steps is None:
        return prepared.inputs
    samples, size, seed = prepared.train, config.finish.batch_size, config.search.seed
    assert samples is not None
    return lambda epoch: samples.epoch(epoch, size, seed)


def verdict(verification: Verification, study: Study, folder: Path) -> str:
    """The last line of a run: what was verified, and what the original has instead."""
    from jointopt.report.quantities import written

    original = study.original
    name = study.quality.name
    told = [f"{verification.size / 1e6:.4g} MB (original {written('size', original.get('size', math.nan))})"]
    if name in verification.metrics:
        value, before = verification.metrics[name], original.get(name, math.nan)
        told.insert(0, f"{name} {value:.4g} (original {before:.4g})")
    if verification.ok:
        return f"verified: {folder}: {', '.join(told)}"
    return f"not verified: {folder}: {'; '.join(verification.differences)}"
