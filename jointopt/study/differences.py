"""In what two configs differ, in few words, so that whoever is refused sees what to put back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SHOWN = 6
LONGEST = 60


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "search.seed was 0, is 1; dtype was null, is auto", values as JSON has them; empty where they are the same."""
    old, new = _flat(before), _flat(now)
    different = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    told = "; ".join(f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in different[:SHOWN])
    return told + (f" and {len(different) - SHOWN} more" if len(different) > SHOWN else "")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {key: value}
    return {k: v for name, each in value.items() for k, v in _flat(each, f"{key}.{name}".lstrip(".")).items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < LONGEST else text[: LONGEST - 3] + "..."
