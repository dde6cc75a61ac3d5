"""Reads what a config names as data into columns: csv, json, parquet, a folder of images, a hub id; or a text file."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jointopt.files import check_path, reading
from quant.errors import JointoptError, in_one_line

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
TEXTS = (".txt", ".md", ".rst")
IMAGES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".webp", ".avif", ".gif", ".tif", ".tiff"),
    *(".bmp", ".dib", ".tga", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""What Pillow reads by itself and is meant as an image: it has names for films and HDF5, too."""
TEXT = ("text", "sentence", "snippet", "review", "content")
TEXT_PAIR = ("text_pair",)
PAIRS = (("question", "sentence"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
"""What the GLUE benchmark and SNLI call a text and the text that belongs to it."""
IMAGE = ("image", "img", "path", "file", "file_name")
LABEL = ("label", "labels", "class", "target")
ALLOWED = "a csv, tsv, json, jsonl, parquet or text file, a folder of images by class, or a hub id"


PARQUET_ROWS = 256
"""Rows of a parquet file that are read at once, which may be images."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class DataSource:
    """One entry of a config's `data`.

    Attributes:
        path: a csv, tsv, json, jsonl, parquet or text file, a folder of images by class, or a hub id.
        split: of a hub data set.
        samples: at most so many rows, the first after a fixed shuffle, or pieces of running text from its start.
        text, text_pair, image, label: names of the columns, where they are not the usual ones; of label several, where
            each output of the model has a column of its own.
        length: tokens in a text at most, or in a piece of running text.
        labelled: whether labels are read; calibration needs none.
        key: what the config calls it, for what is said about it.
    """

    path: str
    split: str | None = None
    samples: int | None = None
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    label: str | Sequence[str] | None = None
    length: int | None = None
    labelled: bool = True
    key: str = "data"

    def __post_init__(self) -> None:
        check_path(self.path, self.key)


class Columns(Mapping[str, list[Any]]):
    """Column name -> values.

    Attributes:
        classes: names of the classes that a column counts, or its lists do, in their order, where the data set itself
            says them.

    Args:
        values: of each column, or what reads them when they are asked for first.
    """

    def __init__(
        self,
        values: Mapping[str, list[Any] | Callable[[], list[Any]]],
        classes: Mapping[str, list[str]] | None = None,
    ) -> None:
        self._values = dict(values)
        self.classes = dict(classes or {})

    def __getitem__(self, name: str) -> list[Any]:
        found = self._values[name]
        if callable(found):
            found = self._values[name] = found()
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def looks_like_hub_id(name: str) -> bool:
    """Whether a string that is no existing path can be meant as "name" or "owner/name" on the hub."""
    owner, _, rest = name.partition("/")
    return bool(_HUB_ID.fullmatch(name)) and not (rest and Path(owner).is_dir())


def is_hub_id(source: DataSource) -> bool:
    """Whether a source is to be looked for on the hub: no path of its name, and no name of a file."""
    path = Path(source.path)
    return not path.exists() and path.suffix.lower() not in TABLES + TEXTS + IMAGES and looks_like_hub_id(source.path)


def read_columns(source: DataSource) -> Columns:
    """Column name -> values; `samples` rows of them.

    Raises:
        JointoptError: a path that does not exist or cannot be read, a hub data set without a split, no row.
    """
    path, key = Path(source.path), source.key
    if path.exists() and source.split is not None:
        raise JointoptError(f"{key}.split: found {source.split!r}, but {source.path!r} is here; allowed: of a hub id")
    if path.is_dir():
        columns = _image_folder(path, key, source.labelled)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        return _parquet_columns(path, source)
    elif path.is_file() and path.suffix.lower() in TABLES:
        columns = _table(path, key)
    elif path.is_file():
        raise JointoptError(
            f"{key}: {source.path!r} has no columns; allowed: {', '.join(TABLES)}, or a folder of images"
        )
    elif is_hub_id(source):
        return _hub_columns(source)
    else:
        raise JointoptError(f"{key}: no file or folder {source.path!r}, and it is no hub id; allowed: {ALLOWED}")
    kept = _kept(len(next(iter(columns.values()), [])), source)
    return Columns({name: [values[index] for index in kept] for name, values in columns.items()})


def read_text(source: DataSource) -> str | None:
    """The content of a text file, None where the source is something else."""
    path = Path(source.path)
    if not path.is_file() or path.suffix.lower() in TABLES:
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise JointoptError(f"{source.key}: {source.path!r} is not UTF-8 text: {error}") from None


def _kept(count: int, source: DataSource) -> list[int]:
    if not count:
        raise JointoptError(f"{source.key}: {source.path!r} holds no row; allowed: one or more")
    return some(count, source.samples)


def some(count: int, samples: int | None) -> list[int]:
    """Indices of `samples` of `count` rows, the first after a fixed shuffle; all of them, in order, for None."""
    if samples is None:
        return list(range(count))
    return np.random.default_rng(0).permutation(count)[:samples].tolist()


def _table(path: Path, key: str) -> Columns:
    kind = path.suffix.lower()
    with reading(f"{key}: {str(path)!r}", "", csv.Error):
        text = path.read_text(encoding="utf-8-sig")
        if kind in (".csv", ".tsv"):
            return _rows(_separated(text, "\t" if kind == ".tsv" else ","))
        whole = kind == ".json" and text.lstrip().startswith("[")
        return _rows(json.loads(text) if whole else _objects(text))


def _parquet_columns(path: Path, source: DataSource) -> Columns:
    """Each column is read by itself, and of its rows little more than those that are kept."""
    import pyarrow.parquet as pq

    with reading(told := f"{source.key}: {str(path)!r}"):
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
        names = schema.empty_table().to_pandas().columns  # without a frame's index
        classes = _parquet_classes(schema.metadata or {})
    kept = _kept(count, source)

    def read(name: str) -> list[Any]:
        with reading(told):
            return _parquet_rows(path, name, kept)

    return Columns({str(name): partial(read, str(name)) for name in names}, classes)


def _parquet_rows(path: Path, name: str, kept: Sequence[int]) -> list[Any]:
    """A column's values in some of its rows, as pandas has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = np.argsort(kept)
    places = np.asarray(kept)[order]
    parts, begin = [], 0
    with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        for batch in file.iter_batches(PARQUET_ROWS, columns=[name]):
            first, last = np.searchsorted(places, (begin, begin + len(batch)))
            if last > first:
                column = batch.column(batch.schema.get_field_index(name))  # a field of a struct is selected as well
                parts.append(_taken(column, places[first:last] - begin))
            begin += len(batch)
        schema = file.schema_arrow
    chunks = pa.chunked_array([chunk for part in parts for chunk in part])
    table = pa.Table.from_arrays([chunks], schema=pa.schema([schema.field(name)], schema.metadata))
    values = table.to_pandas().iloc[:, 0].tolist()
    found = [None] * len(kept)
    for index, value in zip(order, values, strict=True):
        found[index] = value
    return found


def _taken(column: Any, rows: np.ndarray) -> list[Any]:
    """Arrays that together are these rows of an arrow array."""
    import pyarrow as pa

    try:
        return [column.take(pa.array(rows))]
    except pa.ArrowNotImplementedError:  # of views, which can be cut
        return [column.slice(int(row), 1) for row in rows]


def _parquet_classes(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """What `Dataset.to_parquet` of datasets writes beside the columns."""
    said = json.loads(metadata.get(b"huggingface", b"{}"))
    features = (said.get("info") or {}).get("features") or {}
    counted = {name: each.get("feature", each) for name, each in features.items() if isinstance(each, dict)}
    return {name: each["names"] for name, each in counted.items() if each.get("_type") == "ClassLabel"}


def _objects(text: str) -> list[Any]:
    """JSON, a value a line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            told = _over_lines(text) or f"line {number}, column {error.colno}: {error.msg}"
            raise ValueError(told) from None
    return found


def _over_lines(text: str) -> str | None:
    """What is said of JSON that is one value over several lines; None of what is none."""
    try:
        kind = type(json.loads(text)).__name__
    except json.JSONDecodeError:
        return None
    return f"found one {kind} over several lines; allowed: an object a line, or in a .json file a list of objects"


def _separated(text: str, delimiter: str) -> list[dict[str, str]]:
    # The module's own limit, 131,072 characters, is less than long documents have.
    before = csv.field_size_limit(2**31 - 1)
    try:
        lines = [line for line in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if line]
    finally:
        csv.field_size_limit(before)
    header = lines[0] if lines else []
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"the header has {name!r:.200} twice")
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(header):
            raise ValueError(f"row {number} has {len(line)} fields, the header {len(header)}")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _rows(rows: list[Any]) -> Columns:
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}; allowed: an object, its columns by name")
        if set(row) != set(names):
            raise ValueError(f"row {number} has not the columns of the first: {', '.join(map(str, names)):.300}")
    return Columns({str(name): [row[name] for row in rows] for name in names})


def _image_folder(path: Path, key: str, labelled: bool) -> Columns:
    if not labelled and not class_folders(path):
        return Columns({"image": [str(file) for file in _files(path, key) if _is_image(file)]})
    places = {name: os.path.realpath(path / name) for name in class_folders(path)}
    files = [(file, name) for name in places for file in _files(path / name, key, places.values())]
    found = [(str(file), name) for file, name in files if _is_image(file)]
    others = [str(file.relative_to(path)) for file, _ in files if not _is_image(file)]
    flat = sorted(each.name for each in path.iterdir() if _is_image(each) and not each.is_dir())
    beside = [name for name in flat if not name.startswith(".")]
    if found and others:
        warnings.warn(
            f"{str(path)!r}: {len(others)} of {len(files)} files in its class folders are left out, such as "
            f"{others[0]}; images end in {', '.join(IMAGES)}",
            stacklevel=2,
        )
    if found and beside:
        warnings.warn(
            f"{str(path)!r}: {len(beside)} images beside its class folders are left out, such as {beside[0]}",
            stacklevel=2,
        )
    if not found:
        raise JointoptError(
            f"{key}: the folder {str(path)!r} has no images in folders of their class; allowed: {ALLOWED}"
        )
    return Columns({"image": [file for file, _ in found], "label": [name for _, name in found]})


def class_folders(path: Path) -> list[str]:
    """Names of the folders in a folder of images by class, in order."""
    return sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGES


def _files(folder: Path, key: str, classes: Iterable[str] = ()) -> list[Path]:
    """In order, those behind links to folders too, but for links to other `classes`. What systems and notebooks put
    beside a user's files, and copies of these, begins with a dot."""

    def refuse(error: OSError) -> None:
        raise JointoptError(f"{key}: {error.filename!r} cannot be read: {error.strerror}")

    found = []
    place = os.path.realpath(folder)
    seen = {*map(str, Path(place).parents), *classes} - {place}  # links can lead in a circle, and out of the class
    for at, inside, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(at)
        inside[:] = [] if real in seen else sorted(name for name in inside if not name.startswith("."))
        found += [Path(at, name) for name in files if real not in seen and not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def _hub_columns(source: DataSource) -> Columns:
    import datasets

    key = source.key
    if source.split is None:
        raise JointoptError(
            f"{key}: {source.path!r} is taken for a hub id: give its split, {{path: ..., split: train}}"
        )
    try:
        found = datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        told = f"no file or folder {source.path!r} is here, and on the hub it cannot be loaded: {in_one_line(error)}"
        raise JointoptError(f"{key}: {told}") from None
    found = found.select(some(len(found), source.samples))
    classes = {}
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
        counted = getattr(feature, "feature", feature)  # of a list, what its items are
        if isinstance(counted, datasets.ClassLabel):
            classes[name] = counted.names
    return Columns({name: partial(list, found[name]) for name in found.column_names}, classes)


def check_named(source: DataSource, read: Sequence[str]) -> None:
    """Raises JointoptError where the source names a column that is not `read`: it would be ignored."""
    for name in ("text", "text_pair", "image", "label"):
        found = getattr(source, name)
        if found is not None and name not in read:
            allowed = ", ".join(read) or "no column, of running text"
            raise JointoptError(f"{source.key}.{name}: found {found!r}, which is not read here; allowed: {allowed}")


def column(columns: Columns, wanted: str | None, usual: Sequence[str], key: str) -> list[Any]:
    """The column of a name, or the first of the usual names that is there.

    Args:
        key: the config's, for what is said about it ("data.train.label").
    """
    return columns[name_of(columns, wanted, usual, key)]


def name_of(columns: Columns, wanted: str | None, usual: Sequence[str], key: str) -> str:
    """The name of that column. Raises JointoptError where there is none."""
    if wanted is None:
        wanted = next((name for name in usual if name in columns), None)
    if wanted is not None and wanted in columns:
        return wanted
    sought = f"no column {wanted!r}" if wanted else f"none of the columns {', '.join(usual)}"
    raise JointoptError(f"{key}: found {sought}; there are {', '.join(columns):.300}")


def texts(values: Sequence[Any], key: str) -> list[str]:
    """The values, all of which must be text."""
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise JointoptError(f"{key}: found {value!r:.200} in row {row}; allowed: text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise JointoptError(
                f"{key}: found {half!r} at character {error.start + 1} of row {row}; allowed: text, of which half a "
                "surrogate pair is none"
            ) from None
    return list(values)
