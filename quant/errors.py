"""The one exception that a user's mistake raises, in every package of this project."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class JointoptError(ValueError):
    """Something the user gave cannot be used: one line that names it, what was found, and what is allowed."""


@contextmanager
def said_of(what: str, in_place_of: str = "") -> Iterator[None]:
    """What is refused within is said of this: a layer by its path, a key of a config.

    Args:
        in_place_of: what the refusal begins with by itself, left out.
    """
    try:
        yield
    except JointoptError as error:
        raise JointoptError(f"{what}: {str(error).removeprefix(in_place_of)}") from None


DOES_NOT_RUN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a forward pass raises whose layers or inputs do not fit into each other."""


def in_one_line(error: BaseException) -> str:
    """What another library's error says: its first line, and the others where that ends in a colon; cut off where it
    goes on for long."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (" ".join(lines) if lines[0].endswith(":") else lines[0])[:300]


def named_line(error: BaseException) -> str:
    """The same behind the error's type, for messages that say little without it."""
    name, told = type(error).__name__, in_one_line(error)
    return told if told == name else f"{name}: {told}"


def did_you_mean(found: Any, allowed: Iterable[str]) -> str:
    """ "; did you mean 'W8A8'?" for an error's line, whatever the case of the letters; empty where nothing is near."""
    lowered = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(str(found).lower(), lowered, 1)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def check_kind(name: str, value: object, kind: type | tuple[type, ...], allowed: str) -> None:
    """Raises JointoptError for what is of none of these types."""
    if not isinstance(value, kind):
        found = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        raise JointoptError(f"{name}: found {found}; allowed: {allowed}")


def check_choice(name: str, found: object, allowed: Iterable[str]) -> None:
    """Raises JointoptError for what is none of these names."""
    names = tuple(allowed)
    if not isinstance(found, str) or found not in names:
        raise JointoptError(f"{name}: found {found!r}{did_you_mean(found, names)}; allowed: {', '.join(names)}")


def check_count(name: str, value: object, most: float = math.inf) -> None:
    """Raises JointoptError for what is neither None nor a whole number from 1 to `most`."""
    if value is not None:
        check_whole(name, value, 1, most)


def check_whole(name: str, value: object, least: int = 0, most: float = math.inf) -> None:
    """Raises JointoptError for what is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        allowed = f"{least}" if most == math.inf else f"{least} to {most}"
        raise JointoptError(f"{name}: found {value!r}; allowed: a whole number from {allowed}")


def check_number(name: str, value: object, most: float = math.inf) -> None:
    """Raises JointoptError for what is no finite number from 0 to `most`."""
    _check_real(name, value, "0 or more" if most == math.inf else f"from 0 to {most}", lambda x: 0 <= x <= most)


def check_above_0(name: str, value: object, most: float = math.inf) -> None:
    """Raises JointoptError for what is no finite number above 0, up to `most`."""
    allowed = "above 0" if most == math.inf else f"above 0, up to {most}"
    _check_real(name, value, allowed, lambda x: 0 < x <= most)


def _check_real(name: str, value: object, allowed: str, fits: Callable[[float], bool]) -> None:
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or not fits(number):
        raise JointoptError(f"{name}: found {value!r}; allowed: {allowed}")
