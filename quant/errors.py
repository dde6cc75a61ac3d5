"""The one exception that a user's mistake raises, in every package of this project."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class JointoptError(ValueError):
    """Something the user gave cannot be used: one line that names it, what was found, and what is allowed."""


def did_you_mean(found: Any, allowed: Iterable[str]) -> str:
    """ "; did you mean 'W8A8'?" for an error's line, whatever the case of the letters; empty where nothing is near."""
    lowered = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(str(found).lower(), lowered, 1)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def check_count(name: str, value: object) -> None:
    """Raises JointoptError for what is neither None nor a whole number from 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise JointoptError(f"{name}: found {value!r}; allowed: a whole number from 1")
