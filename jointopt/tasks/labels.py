"""Labels of samples, read from a column as the model counts its classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jointopt.rows import LABEL, Columns, DataSource, name_of
from quant.errors import JointoptError


def label_indices(
    columns: Columns, source: DataSource, labels: Sequence[str], folders: Sequence[str] | None = None
) -> list[int]:
    """The column of labels as the model counts them: by name, where the data set has names for its numbers and the
    model for its own; else as `class_indices` does, whose arguments and errors these are."""
    key = f"{source.key}.label"
    name = name_of(columns, source.label, LABEL, key)
    own = columns.classes.get(name)
    if own is None or _nameless(own) or _nameless(labels):
        return class_indices(columns[name], labels, key, folders)
    of_model, indices = [_index_of(each, labels) for each in own], []
    for row, value in enumerate(columns[name], 1):
        at = _whole(value)
        if at is None or not 0 <= at < len(own):
            raise JointoptError(f"{key}: found label {value!r} in row {row}; the data set names 0 to {len(own) - 1}")
        index = of_model[at]
        if index is None:
            raise JointoptError(
                f"{key}: found label {at} in row {row}, which the data set calls {own[at]!r}; the model has "
                f"{_few(labels)}; allowed: the same names, such as in id2label of the model's config"
            )
        indices.append(index)
    return indices


def _index_of(own: str, labels: Sequence[str]) -> int | None:
    """Of the model's labels the one of the same name, be it in capitals; None where there is none, or are several."""
    for same in ([name == own for name in labels], [name.lower() == own.lower() for name in labels]):
        if any(same):
            return same.index(True) if sum(same) == 1 else None
    return None


def _nameless(labels: Sequence[str]) -> bool:
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(labels))


def _few(labels: Sequence[str]) -> str:
    return f"{len(labels)}: {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}"


def class_indices(
    values: Sequence[Any], labels: Sequence[str], key: str, folders: Sequence[str] | None = None
) -> list[int]:
    """Labels as the model counts them.

    Args:
        values: names of the model's labels, or their indices, as numbers or as text.
        labels: the model's, by index.
        folders: which the values are names of, in the order in which they number the classes where the model's labels
            have no names.

    Raises:
        JointoptError: a label that the model does not have; more or fewer folders than classes without names.
    """
    known = {name: index for index, name in enumerate(labels)}
    if all(str(value) in known for value in values):
        several = {name for name, count in Counter(labels).items() if count > 1}
        for row, value in enumerate(values, 1):
            if str(value) in several:
                raise JointoptError(
                    f"{key}: found label {value!r} in row {row}, which several classes of the model are called; "
                    f"allowed: their indices, 0 to {len(labels) - 1}"
                )
        return [known[str(value)] for value in values]
    if folders is not None and _nameless(labels):
        if len(folders) != len(labels):
            raise JointoptError(
                f"{key}: found {len(folders)} folders, and the model has {len(labels)} classes without names, which "
                "folders number alphabetically; allowed: one for each class, be it empty"
            )
        return [folders.index(str(value)) for value in values]
    named, indices = any(str(value) in known for value in values), []
    for row, value in enumerate(values, 1):
        index = known.get(str(value)) if named else _whole(value)
        if index is None or not 0 <= index < len(labels):
            raise JointoptError(
                f"{key}: found label {value!r} in row {row}; the model has {_few(labels)}, or 0 to {len(labels) - 1}"
            )
        indices.append(index)
    return indices


def _whole(value: Any) -> int | None:
    try:
        return int(float(value)) if float(value) == int(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        return None
