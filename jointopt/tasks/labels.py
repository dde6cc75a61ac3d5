"""Labels of samples, read from columns as the model counts its outputs: a class, several at once, measured values."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jointopt.outputs import MULTI_LABEL
from jointopt.rows import LABEL, Columns, DataSource, name_of
from quant.errors import JointoptError

LabelReader = Callable[[Columns, DataSource, Sequence[str], Sequence[str] | None], Tensor]
"""(columns, their source, names of the model's outputs, folders of images by class) -> labels of all rows."""


def class_labels(
    columns: Columns, source: DataSource, names: Sequence[str], folders: Sequence[str] | None = None
) -> Tensor:
    """The class of each row as the model counts them, int64 [rows]: by name, where the data set has names for its
    numbers and the model for its own; else as `class_indices` does, whose arguments and errors these are."""
    key = f"{source.key}.label"
    if not isinstance(source.label, str | None):
        raise JointoptError(
            f"{key}: found {_few(source.label)}, and the model says one class of several; allowed: one column, or a "
            f"model whose config.json has problem_type: {MULTI_LABEL}"
        )
    name = name_of(columns, source.label, LABEL, key)
    return torch.tensor(_indices(columns[name], columns.classes.get(name), names, key, folders))


def multi_labels(
    columns: Columns, source: DataSource, names: Sequence[str], folders: Sequence[str] | None = None
) -> Tensor:
    """Which of the classes each row has, 0 or 1, float32 [rows, classes].

    They are read from a column of 0 and 1 for each class; or from a column of lists, of 0 and 1 for each class where
    all of them are and the data set has no names for its numbers, else of the classes that are there, by name or index.

    Raises:
        JointoptError: a row that is none of these, a class that the model does not have.
    """
    key = f"{source.key}.label"
    each = _column_of_each(columns, source, names)
    if each is not None:
        rows = [list(row) for row in zip(*(columns[name] for name in each), strict=True)]
    else:
        name, rows = _lists(columns, source, "a list of classes")
        flags = all(len(row) == len(names) and all(_whole(value) in (0, 1) for value in row) for row in rows)
        if not flags or columns.classes.get(name) is not None:
            return _listed(rows, columns.classes.get(name), names, key)
    for number, row in enumerate(rows, 1):
        for value in row:
            if _whole(value) not in (0, 1):
                raise JointoptError(f"{key}: found {value!r:.200} in row {number}; allowed: 0 or 1, for each class")
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float32)


def value_labels(
    columns: Columns, source: DataSource, names: Sequence[str], folders: Sequence[str] | None = None
) -> Tensor:
    """The values that the model should give for each row, float32 [rows, outputs], of one output [rows].

    They are read from a column of numbers for each output, or from a column of lists.

    Raises:
        JointoptError: a row that has not one finite number for each output.
    """
    key = f"{source.key}.label"
    each = _column_of_each(columns, source, names)
    if each is not None:
        rows = [list(row) for row in zip(*(columns[name] for name in each), strict=True)]
    else:
        rows = _lists(columns, source, f"a list of {len(names)} numbers")[1]
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise JointoptError(f"{key}: found {row!r:.200} in row {number}; allowed: a list of {len(names)} numbers")
        for value in row:
            if not _is_number(value):
                raise JointoptError(f"{key}: found {value!r:.200} in row {number}; allowed: a number")
    labels = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float32)
    return labels[:, 0] if len(names) == 1 else labels


def _column_of_each(columns: Columns, source: DataSource, names: Sequence[str]) -> list[str] | None:
    """The columns that the model's outputs have one each, in the outputs' order: by the outputs' names where a column
    has one of these, else as the config lists them. None where one column has lists for all outputs."""
    key = f"{source.key}.label"
    if isinstance(source.label, str | None):
        name = name_of(columns, source.label, LABEL, key)
        return [name] if len(names) == 1 and not any(map(_is_list, columns[name])) else None
    given = [name_of(columns, each, (), key) for each in source.label]
    places = _indices_of(given, names)
    if len(given) == len(names) == len(set(given)) and set(places) == {None}:
        return given
    if len(given) != len(names) or set(places) != set(range(len(names))):
        raise JointoptError(
            f"{key}: found {_few(given)}; the model has {_few(names)}; allowed: a column for each of these, of the "
            "same names or in the same order"
        )
    return [given[places.index(at)] for at in range(len(names))]


def _lists(columns: Columns, source: DataSource, allowed: str) -> tuple[str, list[list[Any]]]:
    """The name and the values of a column that has a list in each row."""
    key = f"{source.key}.label"
    name = name_of(columns, source.label if isinstance(source.label, str) else None, LABEL, key)
    for number, value in enumerate(columns[name], 1):
        if not _is_list(value):
            raise JointoptError(
                f"{key}: found {value!r:.200} in row {number}; allowed: {allowed}, or of several columns, a list of "
                "their names as label"
            )
    return name, [list(value) for value in columns[name]]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _listed(rows: Sequence[list[Any]], own: Sequence[str] | None, names: Sequence[str], key: str) -> Tensor:
    """Whether each class is listed in each row, float32 [rows, classes]."""
    labels = torch.zeros(len(rows), len(names), dtype=torch.float32)
    numbers = [number for number, row in enumerate(rows, 1) for _ in row]
    indices = _indices([value for row in rows for value in row], own, names, key, rows=numbers)
    labels[[number - 1 for number in numbers], indices] = 1
    for number, (row, found) in enumerate(zip(rows, labels.sum(1).tolist(), strict=True), 1):
        if found < len(row) or any(isinstance(value, bool | np.bool_) for value in row):
            raise JointoptError(
                f"{key}: found {row!r:.200} in row {number}; allowed: each class once, by name or index, or in all "
                f"rows 0 or 1 for each of {_few(names)}"
            )
    return labels


def _indices(
    values: Sequence[Any],
    own: Sequence[str] | None,
    labels: Sequence[str],
    key: str,
    folders: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
) -> list[int]:
    """`class_indices`, of values for which the data set may have names of its `own`."""
    if own is None or _nameless(own) or _nameless(labels):
        return class_indices(values, labels, key, folders, rows)
    of_model, indices = _indices_of(own, labels), []
    for row, value in zip(rows or count(1), values, strict=False):
        at = _whole(value)
        if at is None or not 0 <= at < len(own):
            raise JointoptError(
                f"{key}: found label {value!r:.200} in row {row}; the data set names 0 to {len(own) - 1}"
            )
        index = of_model[at]
        if index is None:
            raise JointoptError(
                f"{key}: found label {at} in row {row}, which the data set calls {own[at]!r}; the model has "
                f"{_few(labels)}; allowed: the same names, such as in id2label of the model's config"
            )
        indices.append(index)
    return indices


def _indices_of(names: Sequence[str], labels: Sequence[str]) -> list[int | None]:
    """Of the model's labels the one of each name, be it in capitals; None where there is none, or are several."""
    called = _called(names, labels)
    return [called[name][0] if len(called[name]) == 1 else None for name in names]


def _called(names: Iterable[str], labels: Sequence[str]) -> dict[str, list[int]]:
    """For each name the model's labels of the same name; where there are none, of the same in capitals, or written by
    other code points; or of the same number, as pandas writes 1 as 1.0 in a column where a value was ever missing."""
    exact: dict[str, list[int]] = {}
    alike: dict[str | int | None, list[int]] = {}
    nameless = _nameless(labels)  # whose numbers are indices
    for index, label in enumerate(labels):
        exact.setdefault(label, []).append(index)
        alike.setdefault(_folded(label), []).append(index)
        number = None if nameless else _whole(label)
        if number is not None:
            alike.setdefault(number, []).append(index)
    return {name: exact.get(name) or alike.get(_folded(name)) or alike.get(_whole(name), []) for name in names}


def _folded(name: str) -> str:
    # Old file systems of macOS take accents apart from their letters (NFD); keyboards write both as one (NFC).
    return unicodedata.normalize("NFC", name).lower()


def _nameless(labels: Sequence[str]) -> bool:
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(labels))


def named_otherwise(labels: Sequence[str], others: Sequence[str]) -> list[int]:
    """The classes that two models, of as many, call by different names; none where one has no names for them."""
    if _nameless(labels) or _nameless(others):
        return []
    pairs = enumerate(zip(labels, others, strict=True))
    return [at for at, (one, other) in pairs if _folded(one) != _folded(other)]


def moved(labels: Sequence[str], others: Sequence[str]) -> int | None:
    """The first of the model's classes that another one has in another place."""
    known = set(map(_folded, others))
    return next((at for at in named_otherwise(labels, others) if _folded(labels[at]) in known), None)


def _few(labels: Sequence[str]) -> str:
    return f"{len(labels)}: {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}"


def class_indices(
    values: Sequence[Any],
    labels: Sequence[str],
    key: str,
    folders: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
) -> list[int]:
    """Labels as the model counts them.

    Args:
        values: names of the model's labels, be it in capitals, or their indices, as numbers or as text. A number is the
            index of a class only where none of them is a name, as 1.0 is of a class called "1".
        labels: the model's, by index.
        folders: which the values are names of, alphabetically; they number the classes where the model's labels have
            no names, see `_by_class`.
        rows: where the values are, for what is said about them (default: 1, 2, 3, ...).

    Raises:
        JointoptError: a label that the model does not have; folders that cannot number the classes without names.
    """
    classes_of, indices = _reading(values, labels, key, folders), []
    for row, value in zip(rows or count(1), values, strict=False):
        found = () if _missing(value) else classes_of(value)
        if len(found) > 1:
            raise JointoptError(
                f"{key}: found label {value!r:.200} in row {row}, which several classes of the model are called; "
                f"allowed: their indices, 0 to {len(labels) - 1}"
            )
        if not found:
            raise JointoptError(
                f"{key}: found label {value!r:.200} in row {row}; the model has {_few(labels)}, or 0 to "
                f"{len(labels) - 1}"
            )
        indices.append(found[0])
    return indices


def _reading(
    values: Sequence[Any], labels: Sequence[str], key: str, folders: Sequence[str] | None
) -> Callable[[Any], Sequence[int]]:
    """The one way in which all of the values are to be read: value -> the classes that it may be."""
    called = _called({str(value) for value in values if not _missing(value)}, labels)
    if folders is not None and _nameless(labels):
        # Of folders 1 to 10 none may be called 10 among a few samples, and 1 to 9 are not the classes 1 to 9.
        numbers = _called([name for name in folders if name.isdecimal()], labels)
        if not all(called.values()) or not all(numbers.values()):
            if len(folders) != len(labels):
                raise JointoptError(
                    f"{key}: found {len(folders)} folders, and the model has {len(labels)} classes without names, "
                    "which folders number; allowed: one for each class, be it empty"
                )
            place = {name: [index] for index, name in enumerate(_by_class(folders, key))}
            return lambda value: place[str(value)]
    if any(called.values()):
        return lambda value: called[str(value)]
    counted: dict[int | None, list[int]] = {index: [index] for index in range(len(labels))}
    return lambda value: counted.get(_whole(value), [])


def _missing(value: Any) -> bool:
    """Whether it is what json, NumPy or pandas has in place of a value: as text it would name a class called "none"."""
    return not isinstance(value, str) and str(value) in ("None", "nan", "NaN", "<NA>", "NaT")


def _by_class(folders: Sequence[str], key: str) -> list[str]:
    """Names of folders in the order of the classes that they number: the numbers from 0 are the indices of classes, as
    they are in a table; other names count alphabetically, as is usual where a model is trained on folders.

    Raises:
        JointoptError: other numbers, whose order as numbers is another one: models are trained on either.
    """
    if not all(name.isascii() and name.isdecimal() for name in folders):
        return list(folders)
    counted = sorted(folders, key=int)
    indices = list(map(int, counted)) == list(range(len(folders)))
    if counted != list(folders) and not indices:
        raise JointoptError(
            f"{key}: found folders {counted[0]} to {counted[-1]}, which number the {len(folders)} classes of a model "
            "without names for them in one order alphabetically and in another as numbers; allowed: folders 0 to "
            f"{len(folders) - 1}, the indices of the classes, or a model whose config has these names in id2label"
        )
    if counted != list(folders):
        warnings.warn(
            f"folders 0 to {len(folders) - 1} are taken for the indices of the model's classes, not alphabetically",
            stacklevel=2,
        )
    return counted


def check_same_folders(folders: Mapping[str, Sequence[str]], labels: Sequence[str]) -> None:
    """Raises JointoptError where a class without a name is one thing in some of the data and another in the rest.

    Args:
        folders: key of the config -> names of its folders of images by class.
        labels: the model's, by index.
    """
    if not _nameless(labels) or all(all(_called(names, labels).values()) for names in folders.values()):
        return
    (first, one), *others = folders.items()
    for key, other in others:
        alone = sorted({*one} ^ {*other})
        if alone:
            raise JointoptError(
                f"{key}: its folders number the model's classes, which have no names, and so do those of {first}; "
                f"found {_few(alone)} in one alone; allowed: folders of the same names in both, be they empty"
            )


def _whole(value: Any) -> int | None:
    try:
        return int(float(value)) if float(value) == int(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 can hold, or one as text."""
    try:
        return abs(float(value)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, OverflowError):
        return False
