"""Configs as JSON holds them, and in what two differ, so that whoever is refused sees in few words what to put back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os.path import commonprefix
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from quant.errors import JointoptError

SHOWN = 6
LONGEST, BEFORE = 60, 20
"""Characters that are told of a value, and of these before the first in which it differs, where that comes late."""


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "search.seed was 0, is 1; dtype was null, is auto", values as JSON has them; empty where they are the same."""
    old, new = flat(before), flat(now)
    different = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    told = "; ".join(f"{key} {_was_and_is(old.get(key), new.get(key))}" for key in different[:SHOWN])
    return told + (f" and {len(different) - SHOWN} more" if len(different) > SHOWN else "")


def check_config(path: Path | None, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises JointoptError where a search is another than the one that the study at `path` is of; says how."""
    facts = differing({**stored, "config": None}, {**wanted, "config": None})
    config = differing(stored["config"] or {}, wanted["config"])
    if facts or config:
        told = "; ".join(filter(None, (facts, config)))
        if (stored["config"] or {}).get("supernet") != wanted["config"].get("supernet"):
            told += (
                " (other weights, space or calibration, another version of jointopt, or another kind of processor, "
                "whose last bits sort channels in another order)"
            )
        raise JointoptError(f"study {str(path)!r} has another config: {told}; allowed: that one, or another storage")


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """{"search.seed": 0, "dtype": None} of mappings in mappings; `key` is put before all."""
    if not isinstance(value, Mapping):
        return {key: value}
    return {k: v for name, each in value.items() for k, v in flat(each, f"{key}.{name}".lstrip(".")).items()}


def as_json(key: str, value: Any) -> Any:
    """As JSON gives it back. Raises JointoptError for what it cannot hold, by the key."""
    return json.loads(json.dumps(_without_types(key, value)))


def _without_types(key: str, value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return _without_types(key, value.tolist())
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str | int):
                raise JointoptError(f"{key}: found the key {name!r:.60}; allowed: text or whole numbers")
        return {name: _without_types(f"{key}.{name}", each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_types(f"{key}[{at}]", each) for at, each in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise JointoptError(
        f"{key}: found {value!r:.60}; allowed: text, numbers, paths, arrays, None, and lists and mappings of these"
    )


def _was_and_is(before: Any, now: Any) -> str:
    old, new = json.dumps(before), json.dumps(now)
    same = len(commonprefix([old, new]))
    start = same - BEFORE if same > LONGEST - BEFORE else 0
    return f"was {_short(old, start)}, is {_short(new, start)}"


def _short(text: str, start: int) -> str:
    text = "..." + text[start:] if start else text
    return text if len(text) < LONGEST else text[: LONGEST - 3] + "..."
