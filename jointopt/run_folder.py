"""The output folder of a run: what is in it, whose it is, and that one run at a time works in it.

It holds config.yaml, study.db, report.html, export/ and, where the config trains, supernet.safetensors with
supernet.json, which says what it was trained with; training.safetensors, from which training goes on, while it trains;
latency.json, what was timed of this machine, where the config asks for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jointopt.config.config import Config, load_config
from jointopt.files import check_path, locked, reading, write_whole, writing
from jointopt.study.differences import differing, flat
from jointopt.timing.hardware import LATENCY
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.study.study import Study

T = TypeVar("T")
STUDY, CONFIG, REPORT, EXPORT = "study.db", "config.yaml", "report.html", "export"
WEIGHTS, TRAINED, CHECKPOINT = "supernet.safetensors", "supernet.json", "training.safetensors"
LOCK = ".run.lock"


def check_output(config: Config) -> None:
    """Refuses an output folder of something else, and one of a run with another config, naming the differences."""
    check_path(config.output, "output")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise JointoptError(f"output: {config.output!r} is a file; allowed: a folder")
    if not output.is_dir() or all(each.name.startswith(LOCK) for each in output.iterdir()):
        return
    if not (output / CONFIG).is_file():
        raise JointoptError(
            f"output: {config.output!r} exists and is no run; allowed: a new folder, or a run to go on with"
        )
    searched = (output / STUDY).is_file() and study_says(
        config.output, lambda study: study.last_generation() is not None, True
    )
    if searched or any((output / name).is_file() for name in (TRAINED, CHECKPOINT, LATENCY)):
        told = _told(load_config(output / CONFIG), config, searched)
        if told:
            raise JointoptError(
                f"output: {config.output!r} was made with another config: {told}; "
                "allowed: that config, or another output"
            )


def study_says(output: str, read: Callable[[Study], T], refused: T) -> T:
    """What is read of the run's study; `refused` where that cannot be opened, whose error is the search's to say."""
    from jointopt.study.study import Study

    try:
        with closing(Study.open(Path(output) / STUDY)) as study:
            return read(study)
    except JointoptError:
        return refused


def _told(before: Config, now: Config, searched: bool) -> str:
    """How two configs differ in what must not change, empty where they do not. Values are what the configs say: records
    lack some that are the default, and data.train where nothing reads it."""
    records = [flat(_kept_to(each, searched)) for each in (before, now)]
    said = [flat(each.model_dump(exclude_none=True)) for each in (before, now)]
    values = [{**record, **each} for record, each in zip(records, said, strict=True)]
    return differing(*({key: each.get(key) for key in chain(*records)} for each in values))


def _kept_to(config: Config, searched: bool) -> dict[str, Any]:
    """What must not change. Before anything was searched that is less, so that a mistake there costs no training."""
    content = config.record()
    if searched:
        return content
    return {**config.training_record(), **{key: content.get(key) for key in ("hardware", "target")}}


@contextmanager
def taken(config: Config) -> Iterator[None]:
    """Makes the output folder, keeps other runs out of it, and writes the config into it.

    Raises:
        JointoptError: another run is in it, what `check_output` refuses, it cannot be written.
    """
    from jointopt.checkpoint.exporting import clear_killed

    output = Path(config.output)
    with writing(f"output: {str(output)!r}"):
        output.mkdir(parents=True, exist_ok=True)
    with closing(locked(output / LOCK, f"output {str(output)!r}")):
        check_output(config)
        write_whole(output / CONFIG, config.to_yaml(), "output")
        clear_killed(output / EXPORT)
        yield


def read_json(path: Path, key: str, allowed: str) -> dict[str, Any]:
    """What a run wrote; {} where it wrote nothing.

    Args:
        key, allowed: of an error's line where the file is damaged.
    """
    if not path.is_file():
        return {}
    with reading(f"{key}: {str(path)!r}", allowed):
        return dict(json.loads(path.read_text()))
