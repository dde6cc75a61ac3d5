"""A config's model and data, loaded and checked against each other before anything is run."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from jointopt.batches import Batch, without_labels
from jointopt.config.config import Config
from jointopt.digests import digest_of
from jointopt.rows import class_folders, is_hub_id
from jointopt.timing.hardware import latency_of
from quant.errors import JointoptError, named_line
from search_spaces.families import declare

if TYPE_CHECKING:
    from jointopt.evaluation.evaluation import Quality
    from jointopt.models import LoadedModel
    from jointopt.tasks.problems import Problem
    from jointopt.tasks.task import Samples

PROCESSED = 1024
"""Samples of training data that are made, so that a processor or tokenizer that changed is noticed."""


@dataclass(frozen=True)
class Prepared:
    """A config's model and data, loaded and checked against each other.

    Attributes:
        quality: model -> metrics, on the evaluation's batches or by the user's function.
        objectives: name -> direction.
        inputs: batches to calibrate with.
        train: samples to train or finish with, None where the config does neither.
        contents: "evaluate", "calibrate", "test" -> digest of its batches.
        prepare_inputs: processor -> these batches, as it makes them of the same samples.
        unseen: model -> metrics on data that the search does not see, None where the config names none.
    """

    loaded: LoadedModel
    quality: Quality
    objectives: dict[str, str]
    inputs: list[Batch]
    train: Samples | None
    contents: dict[str, str]
    prepare_inputs: Callable[[Any], list[Batch]]
    unseen: Quality | None = None

    @property
    def searched(self) -> dict[str, str]:
        """The contents that a study's evaluations depend on: what it does not see may be another later."""
        return {entry: found for entry, found in self.contents.items() if entry != "test"}

    @cached_property
    def trained_on(self) -> str:
        """The training data's count and digests: of all its samples, and of some as the model gets them. Of a config
        that trains or finishes."""
        assert self.train is not None
        found = xxhash.xxh3_128()
        for index in range(self.train.count):
            mark = self.train.mark(index)
            found.update(f"{len(mark)} ".encode() + mark)
        processed = digest_of(islice(self.train.epoch(0, 32, 0), PROCESSED // 32))
        return f"{self.train.count} {found.hexdigest()} {processed}"


def stay_offline(config: Config) -> None:
    """Forbids the hub's libraries to look anything up, unless the config names a hub id or timm/NAME. Before they are
    imported.

    Raises:
        JointoptError: a model that is not there. Of a teacher training says so: all else does without.
    """
    from jointopt.models import find_source

    local = find_source(config.model).local
    if config.train is not None and config.train.distill and config.train.distill.teacher is not None:
        with suppress(JointoptError):
            local &= find_source(config.train.distill.teacher).local
    given = [
        config.source(entry) for entry in ("train", "calibrate", "evaluate", "test") if getattr(config.data, entry)
    ]
    if local and not any(is_hub_id(source) for source in given):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def prepare(config: Config, target: str | None = None) -> Prepared:
    """Loads the model and the data, and checks all that can be checked before anything is run.

    Args:
        target: what the export is for (default: the config's).

    Raises:
        JointoptError: whatever does not fit, named by its key.
    """
    from jointopt.checkpoint.writers import WRITERS
    from jointopt.models import load_model
    from jointopt.targets import TARGETS, check_installed
    from jointopt.tasks import TASKS
    from jointopt.tasks.labels import check_same_folders
    from jointopt.tasks.task import label_names

    latency_of(config)
    writer = WRITERS[target or config.target]
    check_installed(TARGETS[target or config.target])
    function = import_function(config.quality) if config.quality else None
    loaded = load_model(config.model, config.task, config.device, config.dtype)
    writer.check(declare(loaded.model)[0], loaded.processor)
    if loaded.untrained and config.train is None:
        raise JointoptError(
            f"model: {config.model!r} has no weights for {', '.join(loaded.untrained[:4])}; allowed: a model "
            f"fine-tuned for {loaded.task}, or train"
        )
    task = TASKS[loaded.task]
    size = config.data.batch_size or task.batch_size

    def prepare_inputs(processor: Any) -> list[Batch]:
        samples = task.samples(config.source("calibrate", task.calibration), processor, loaded.model)
        return [without_labels(batch) for batch in samples.batches(size)]

    problem = task.problem(loaded.model)
    if function is None:
        task.check_scored(loaded.model)
    objectives = _objectives(config, problem)

    contents, marks = {}, {}

    def scored_on(entry: str) -> Quality:
        samples = task.samples(config.source(entry), loaded.processor, loaded.model)
        scored = samples.batches(size)
        contents[entry] = digest_of(scored)
        if config.data.test is not None:
            marks[f"data.{entry}"] = list(_marks(samples))
        return problem.quality(scored, loaded.model if "kl" in objectives else None, f"data.{entry}.label")

    quality = _named_failures(function, str(config.quality)) if function is not None else scored_on("evaluate")
    inputs = prepare_inputs(loaded.processor)
    contents["calibrate"] = digest_of(inputs)
    trains = config.train is not None or (config.finish is not None and config.finish.steps is not None)
    train = task.samples(config.source("train"), loaded.processor, loaded.model) if trains else None
    unseen = scored_on("test") if config.data.test is not None else None
    if unseen is not None:
        _check_unseen(marks.pop("data.test"), marks if train is None else {**marks, "data.train": _marks(train)})
    labelled = {"train": trains, "evaluate": function is None, "test": unseen is not None}
    given = [config.source(entry) for entry, read in labelled.items() if read]
    folders = {source.key: class_folders(Path(source.path)) for source in given if Path(source.path).is_dir()}
    check_same_folders(folders, label_names(loaded.model))
    return Prepared(loaded, quality, objectives, inputs, train, contents, prepare_inputs, unseen)


def _marks(samples: Samples) -> Iterator[bytes]:
    return (xxhash.xxh3_128_digest(samples.mark(index)) for index in range(samples.count))


def _check_unseen(test: Sequence[bytes], seen: Mapping[str, Iterable[bytes]]) -> None:
    """Raises JointoptError where the search has seen most of what its front is to be scored on again; tells of less,
    as short texts are the same by chance.

    Args:
        test: marks of samples. One that several samples have tells none of them from another.
        seen: key of the config -> marks.
    """
    own = _once(test)
    for key, found in seen.items():
        shared = len(_once(mark for mark in found if mark in own))
        told = f"data.test: {shared} of its {len(test)} samples are in {key} too"
        if 2 * shared > len(test):
            raise JointoptError(f"{told}; allowed: samples that the search does not see")
        if shared:
            warnings.warn(told, stacklevel=2)


def _once(marks: Iterable[bytes]) -> set[bytes]:
    return {mark for mark, times in Counter(marks).items() if times == 1}


def _objectives(config: Config, problem: Problem) -> dict[str, str]:
    from jointopt.objectives import COSTS, QUANTITIES

    if config.objectives is None:
        first = "quality" if config.quality else problem.metrics[0]
        return {first: QUANTITIES[first].direction, "size": "min"}
    found = {entry.name: str(entry.direction) for entry in config.objectives}
    for name in found:
        if config.quality is None and name not in (*problem.metrics, *COSTS):
            raise JointoptError(
                f"objectives: found {name}; allowed: what is measured of this model, {', '.join(problem.metrics)}, "
                f"and costs, {', '.join(COSTS)}"
            )
    return found


def import_function(name: str) -> Callable[[Any], Any]:
    """The function that "package.module.function" names, from the current directory too.

    Raises:
        JointoptError: no such module or function.
    """
    module, _, function = name.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise JointoptError(f"quality: {name!r}: {error}; looked in the current directory too") from None
    except (Exception, SystemExit) as error:
        raise JointoptError(f"quality: importing {module!r} raised {named_line(error)}") from error
    if not callable(found):
        raise JointoptError(f"quality: the module {module!r} has no function {function!r}")
    return found


def _named_failures(function: Callable[[Any], Any], name: str) -> Quality:
    """The user's function, what it raises said in one line that names it."""

    def quality(model: Any) -> Any:
        try:
            return function(model)
        except (Exception, SystemExit) as error:
            raise JointoptError(f"quality: {name} raised {named_line(error)}") from error

    return quality
