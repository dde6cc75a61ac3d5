"""Reads what a config names as data: csv, json, parquet, a text file, an image folder, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quant.errors import JointoptError

LABEL = ("label", "labels", "class", "target")
_READERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".rst": "text",
    ".md": "text",
}


@dataclass(frozen=True)
class DataSource:
    """One entry of a config's `data`.

    Attributes:
        path: a file, an image folder, or a hub id.
        split: of a hub data set (default: its own for the entry).
        samples: at most so many rows (causal-lm: pieces), the first after a fixed shuffle; None takes all.
        text, image, label: names of the columns, where they are not the usual ones.
        length: tokens a piece for causal-lm.
    """

    path: str
    split: str = "train"
    samples: int | None = None
    text: str | None = None
    image: str | None = None
    label: str | None = None
    length: int | None = None


@dataclass(frozen=True)
class Rows:
    """A table that was read. `base` is the folder that paths in it are relative to."""

    table: Any
    source: DataSource
    base: Path

    def column(self, key: str, usual: Sequence[str]) -> list[Any]:
        """The column that the config names under `key`, or the first of the usual names that is there."""
        names = list(self.table.column_names)
        given = getattr(self.source, key)
        if given is not None and given not in names:
            raise JointoptError(f"data {self.source.path!r}: {key} column {given!r} not found; there are {', '.join(names)}")
        found = given or next((name for name in usual if name in names), None)
        if found is None:
            raise JointoptError(
                f"data {self.source.path!r}: no {key} column; found {', '.join(names)}; looked for {', '.join(usual)}, "
                f"or name it: {{path: ..., {key}: NAME}}"
            )
        return list(self.table[found])


def read_rows(source: DataSource) -> Rows:
    """The rows of a source.

    Raises:
        JointoptError: it does not exist, cannot be read, or is empty.
    """
    import datasets

    path = Path(source.path)
    datasets.disable_progress_bars()
    if path.exists():
        table = _read_local(path, datasets)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) and path.suffix not in _READERS:
        table = _explained(source.path, lambda: datasets.load_dataset(source.path, split=source.split))
    else:
        raise JointoptError(f"data: {source.path!r} does not exist, and is no hub id")
    if not len(table):
        raise JointoptError(f"data {source.path!r}: is empty")
    if source.samples is not None and path.suffix not in (".txt", ".rst", ".md"):
        table = table.shuffle(seed=0).select(range(min(source.samples, len(table))))
    return Rows(table, source, path if path.is_dir() else path.parent)


def _read_local(path: Path, datasets: Any) -> Any:
    if path.is_dir():
        reader: str = "imagefolder"
        options: dict[str, Any] = {"data_dir": str(path)}
    elif path.suffix in _READERS:
        reader, options = _READERS[path.suffix], {"data_files": str(path)}
        if reader == "text":
            options["sample_by"] = "document"
    else:
        raise JointoptError(f"data: {str(path)!r} is of no known kind; allowed: {', '.join(_READERS)}, an image folder")
    return _explained(str(path), lambda: datasets.load_dataset(reader, split="train", **options))


def _explained(name: str, read: Any) -> Any:
    """What the readers of `datasets` raise (a great many kinds), as one line that names the data."""
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - re-raised in the user's terms
        raise JointoptError(f"data {name!r}: cannot be read: {str(error).splitlines()[0][:300]}") from error


def labels_of(rows: Rows, model: nn.Module) -> list[int]:
    """The label column as the model's class numbers.

    Names are looked up among the model's own; a folder's classes, where the model does not know their names, count in
    alphabetical order.

    Raises:
        JointoptError: a label that the model has no class for.
    """
    found = rows.column("label", LABEL)
    config = getattr(model, "config", None)
    classes = config.num_labels if config is not None else model.num_classes
    known = {str(name).lower(): int(number) for number, name in (getattr(config, "id2label", None) or {}).items()}
    column = rows.source.label or next(name for name in LABEL if name in rows.table.column_names)
    names = getattr(rows.table.features[column], "names", None)
    if names is not None and all(str(name).lower() in known for name in names):
        found = [known[str(names[label]).lower()] for label in found]
    labels = []
    for label in found:
        number = known.get(str(label).lower()) if isinstance(label, str) else label
        if isinstance(label, str) and number is None and label.isdigit():
            number = int(label)
        if number is None or number != int(number) or not 0 <= int(number) < classes:
            named = f" ({', '.join(list(known)[:8])})" if known else ""
            raise JointoptError(
                f"data {rows.source.path!r}: label {label!r} does not fit the model; allowed: 0 to {classes - 1}{named}"
            )
        labels.append(int(number))
    return labels
