"""Reads what a config's `data` names into columns, and makes batches of the samples that a task finds in them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.errors import JointoptError

from .config import Source
from .models import looks_like_hub_id

Columns = dict[str, list[Any]]
Batch = Mapping[str, Tensor]

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
TEXTS = (".txt", ".md", ".rst")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
ALLOWED = "a csv, tsv, json, jsonl, parquet or text file, a folder of images by class, or a hub id"


@dataclass(frozen=True)
class Samples:
    """Samples that are ready to be put into batches.

    Attributes:
        count: how many.
        collate: indices -> a batch of the model's inputs and "labels", on the CPU.
        order: the order in which they are evaluated; texts of like length together, so that little is padded.
    """

    count: int
    collate: Callable[[Sequence[int]], dict[str, Tensor]]
    order: Sequence[int]

    def batches(self, size: int, device: torch.device) -> list[Batch]:
        """All samples once, in their order, on the device."""
        parts = [self.order[at : at + size] for at in range(0, self.count, size)]
        return [_moved(self.collate(part), device) for part in parts]

    def epoch(self, number: int, size: int, seed: int, device: torch.device) -> Iterable[Batch]:
        """All samples once, in an order of the epoch's own, made one batch at a time; the last, smaller one is left out
        where there is another."""
        order = np.random.default_rng([seed, number]).permutation(self.count).tolist()
        last = self.count - self.count % size if self.count >= size else self.count
        for at in range(0, last, size):
            yield _moved(self.collate(order[at : at + size]), device)


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def is_hub_id(source: Source) -> bool:
    """Whether a source is to be looked for on the hub: no path of its name, and no name of a file."""
    path = Path(source.path)
    return not path.exists() and path.suffix not in TABLES + TEXTS + IMAGES and looks_like_hub_id(source.path)


def read_columns(source: Source, key: str) -> Columns:
    """Column name -> values; `samples` rows of them, spread evenly.

    Args:
        key: the config's, for what is said about it ("data.train").

    Raises:
        JointoptError: a path that does not exist or cannot be read, a hub data set without a split, no row.
    """
    path = Path(source.path)
    if path.is_dir():
        columns = _image_folder(path, key)
    elif path.is_file() and path.suffix in TABLES:
        columns = _table(path, key)
    elif path.is_file():
        raise JointoptError(
            f"{key}: {source.path!r} has no columns; allowed: {', '.join(TABLES)}, or a folder of images"
        )
    elif is_hub_id(source):
        return _hub_columns(source, key)
    else:
        raise JointoptError(f"{key}: no file or folder {source.path!r}, and it is no hub id; allowed: {ALLOWED}")
    count = len(next(iter(columns.values()), []))
    if not count:
        raise JointoptError(f"{key}: {source.path!r} holds no row; allowed: one or more")
    kept = spread(count, source.samples)
    return {name: [values[index] for index in kept] for name, values in columns.items()}


def read_text(source: Source, key: str) -> str | None:
    """The content of a text file, None where the source is something else."""
    path = Path(source.path)
    if not path.is_file() or path.suffix in TABLES:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JointoptError(f"{key}: {source.path!r} is not UTF-8 text: {error}") from None


def spread(count: int, samples: int | None) -> list[int]:
    """`samples` indices below `count`, evenly apart, so that data sorted by class gives some of every class."""
    if samples is None or samples >= count:
        return list(range(count))
    return [index * count // samples for index in range(samples)]


def _table(path: Path, key: str) -> Columns:
    try:
        if path.suffix == ".parquet":
            import pandas as pd

            frame = pd.read_parquet(path)
            return {str(name): frame[name].tolist() for name in frame.columns}
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".csv", ".tsv"):
            return _rows(
                list(csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")), path
            )
        whole = path.suffix == ".json" and text.lstrip().startswith("[")
        return _rows(
            json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()], path
        )
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, JointoptError):
            raise JointoptError(f"{key}: {error}") from None
        raise JointoptError(f"{key}: {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from None


def _rows(rows: list[Any], path: Path) -> Columns:
    if not rows:
        return {}
    names = list(rows[0]) if isinstance(rows[0], dict) else []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or set(row) != set(names) or None in row or None in row.values() and _short(row):
            raise JointoptError(
                f"{str(path)!r}: row {number} has not the columns of the first: {', '.join(map(str, names))}"
            )
    return {name: [row[name] for row in rows] for name in names}


def _short(row: Mapping[Any, Any]) -> bool:
    """Whether the csv reader filled a row up: all values are text but for the Nones at its end."""
    return all(isinstance(value, str | None) for value in row.values())


def _image_folder(path: Path, key: str) -> Columns:
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found = [(str(file), folder.name) for folder in folders for file in _images(folder)]
    if not found:
        raise JointoptError(
            f"{key}: the folder {str(path)!r} has no images in folders of their class; allowed: {ALLOWED}"
        )
    return {"image": [file for file, _ in found], "label": [name for _, name in found]}


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES)


def _hub_columns(source: Source, key: str) -> Columns:
    import datasets

    if source.split is None:
        raise JointoptError(
            f"{key}: {source.path!r} is taken for a hub id: give its split, {{path: ..., split: train}}"
        )
    try:
        found = datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise JointoptError(
            f"{key}: no file or folder {source.path!r} is here, and on the hub it cannot be loaded: {said}"
        ) from None
    found = found.select(spread(len(found), source.samples))
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return {name: list(found[name]) for name in found.column_names}


def column(columns: Columns, wanted: str | None, usual: Sequence[str], key: str) -> list[Any]:
    """The column of a name, or the first of the usual names that is there.

    Args:
        key: the config's, for what is said about it ("data.train.label").
    """
    if wanted is None:
        wanted = next((name for name in usual if name in columns), None)
    if wanted in columns:
        return columns[wanted]
    sought = f"no column {wanted!r}" if wanted else f"none of the columns {', '.join(usual)}"
    raise JointoptError(f"{key}: found {sought}; there are {', '.join(columns)}")


def texts(values: Sequence[Any], key: str) -> list[str]:
    """The values, all of which must be text."""
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise JointoptError(f"{key}: found {value!r} in row {row}; allowed: text")
    return list(values)


def class_indices(values: Sequence[Any], labels: Sequence[str], key: str, by_folder: bool = False) -> list[int]:
    """Labels as the model counts them.

    Args:
        values: names of the model's labels, or their indices, as numbers or as text.
        labels: the model's, by index.
        by_folder: the values are names of folders, which number the classes alphabetically where the model's labels
            have no names.

    Raises:
        JointoptError: a label that the model does not have.
    """
    known = {name: index for index, name in enumerate(labels)}
    if all(str(value) in known for value in values):
        return [known[str(value)] for value in values]
    classes = sorted({str(value) for value in values})
    nameless = all(name == f"LABEL_{i}" or name == str(i) for i, name in enumerate(labels))
    if by_folder and nameless and len(classes) == len(labels):
        return [classes.index(str(value)) for value in values]
    indices = []
    for row, value in enumerate(values, 1):
        index = _whole(value)
        if index is None or not 0 <= index < len(labels):
            names = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
            raise JointoptError(
                f"{key}: found label {value!r} in row {row}; the model has {len(labels)}: {names}, "
                f"or 0 to {len(labels) - 1}"
            )
        indices.append(index)
    return indices


def _whole(value: Any) -> int | None:
    try:
        return int(value) if float(value) == int(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        return None
