"""Parts of a file of ours, and what pydantic finds wrong with one in one line: line, key, what was found, what is
allowed."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from jointopt.names import DEVICES, MODELS
from jointopt.yaml_lines import dotted
from quant.errors import did_you_mean


class Section(BaseModel):
    """A part of a file: known keys alone, of the right types, unchangeable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def one_line(
    error: ValidationError, schema: type[BaseModel], content: Any, lines: Mapping[tuple, int], path: str
) -> str:
    """The first of pydantic's complaints, a misspelt key before the missing one that it was meant to be.

    Args:
        schema: what the content was checked against.
        lines: path of keys and list indices -> line number in the file.
    """
    complaints = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first = complaints[0]
    at = first["loc"] if first["type"] in ("extra_forbidden", "missing") else _resolving(first["loc"], content)
    line = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), None)
    where = f"{path}, line {line}: " if line else f"{path}: "
    return where + (f"{dotted(at)}: " if at else "") + _complaint(first, schema, at)


def _resolving(loc: tuple, content: Any) -> tuple:
    """The part of pydantic's location that the file has; the rest names members of a union."""
    for depth, key in enumerate(loc):
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return loc[:depth]
    return loc


def _complaint(error: Any, schema: type[BaseModel], at: tuple) -> str:
    kind, found = error["type"], described(error["input"])
    of_key = error["loc"][-1:] == ("[key]",)  # pydantic's place of what is wrong with a dict's key
    if kind == "extra_forbidden" or (of_key and kind == "literal_error"):
        valid = _keys_at(schema, at[:-1])
        return f"unknown key{did_you_mean(at[-1], valid)}; allowed: {', '.join(valid)}"
    if kind == "missing":
        return "found nothing; allowed: " + _expected(schema, at)
    if kind == "value_error":
        return f"found {error['ctx']['error']}"
    if kind == "too_short":
        return "found an empty list; allowed: one or more"
    quotes = " (in quotes, where it looks like a number or a truth value)" if _unquoted(error) else ""
    return f"found {found}; allowed: " + (_bound(error) or ("text" if of_key else _expected(schema, at))) + quotes


def _unquoted(error: Any) -> bool:
    """Whether YAML took for a number, or for true or false, what was to be a text: 2024, no."""
    return error["type"] == "string_type" and isinstance(error["input"], int | float)


def _bound(error: Any) -> str | None:
    signs = {
        "greater_than": ("gt", "more than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
        "less_than_equal": ("le", "at most"),
    }
    if error["type"] not in signs:
        return None
    key, words = signs[error["type"]]
    return f"{words} {error['ctx'][key]}"


_WORDS = {
    "model": MODELS,
    "output": "a folder",
    "device": DEVICES,
    "objectives": "a list of names",
    "choose": "{size_mb: 20}, {drop: 0.01} or knee",
    "constraints": "{size_mb: '<= 20'} and the like",
}
_KINDS: dict[Any, tuple[str, str]] = {
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true, false", "true or false"),
}


def _expected(schema: type[BaseModel], at: tuple) -> str:
    """What is allowed at a key, in words, read off the type it is declared with."""
    if len(at) == 1 and at[0] in _WORDS:
        return _WORDS[at[0]]
    kind: Any = schema
    for key in at:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        sections = [each for each in _members(kind) if isinstance(each, type) and issubclass(each, BaseModel)]
        if isinstance(key, int) or not sections or key not in sections[0].model_fields:
            continue
        kind = sections[0].model_fields[key].annotation
    words: list[str] = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            words += [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(member)]
        elif isinstance(member, type) and issubclass(member, BaseModel):
            paths = ["a path or a hub id, or"] if "path" in member.model_fields else []
            words.append(" ".join([*paths, "keys of", ", ".join(member.model_fields)]))
        elif get_origin(member) is dict:
            keys, values = get_args(member)
            named = " or ".join(_KINDS[each][1] for each in _members(values))
            words.append(f"keys of {', '.join(get_args(keys))}" if get_args(keys) else f"names with {named}")
        elif get_origin(member) is list and not isinstance(at[-1], int):
            words.append("a list of " + " or ".join(_KINDS[each][1] for each in _members(get_args(member)[0])))
        elif get_origin(member) is list:
            words += [_KINDS[each][0] for each in _members(get_args(member)[0])]
        else:
            words.append(_KINDS[member][0])
    return ", ".join(words)


def _members(kind: Any) -> list[Any]:
    """The types a union allows, annotations taken off and None left out."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for each in get_args(kind) for member in _members(each)]
    return [] if kind is type(None) else [kind]


def _keys_at(schema: type[BaseModel], at: tuple) -> list[str]:
    section: Any = schema
    for key in at:
        if isinstance(key, str) and key in section.model_fields:
            section = _members(section.model_fields[key].annotation)[0]
    return list(get_args(get_args(section)[0]) if get_origin(section) is dict else section.model_fields)


LONGEST = 200
"""Characters of a text that are repeated: what is no config may be a whole book."""


def described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "keys " + ", ".join(map(str, value)) if value else "no keys"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]!r} and {len(value) - LONGEST} characters more"
    if isinstance(value, str | int | float):
        return repr(value)
    return f"a {type(value).__name__}"
