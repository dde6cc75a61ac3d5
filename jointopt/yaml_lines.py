"""YAML by safe loading, and which line says what, which PyYAML does not tell; a key that is there twice, or is no text,
is refused.

Numbers are those of YAML 1.2 (10.3.2): 5e-5 is one, 010 is ten, 1:00 and dates are text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from quant.errors import JointoptError


class Loader(yaml.SafeLoader):
    """Reads it."""


class Dumper(yaml.SafeDumper):
    """Its inverse, which writes text that looks like a number in quotes."""


_INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_TEXT = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "value"))
"""Of keys: a text, <<, =."""
_NUMBERS = {
    _INT: r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+",
    _FLOAT: r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _each in (Loader, Dumper):
    _each.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in (_INT, _FLOAT, _DATE)]
        for first, known in _each.yaml_implicit_resolvers.items()
    }
    for _tag, _pattern in _NUMBERS.items():
        _each.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$", re.ASCII), list("-+.0123456789"))


def _whole(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


Loader.add_constructor(_INT, _whole)


def read_yaml(text: str, where: str) -> tuple[Any, dict[tuple, int]]:
    """What a file holds, and path of keys and list indices -> line number.

    Args:
        where: an error begins with: the file.

    Raises:
        JointoptError: it is not YAML, has a key twice or one that is no text, holds itself.
    """
    try:
        node = yaml.compose(text, Loader=Loader)
        lines = lines_of(node, where) if node else {}
        return yaml.load(text, Loader=Loader), lines
    except JointoptError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise JointoptError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, LookupError, AttributeError) as error:  # of a value that is not what its tag says
        raise JointoptError(f"{where}: not YAML: a value is not what its tag says: {error!r}") from None
    except RecursionError:
        told = "a list or mapping that holds itself, or is nested too deeply"
        raise JointoptError(f"{where}: found {told}; allowed: none such") from None


def lines_of(node: yaml.Node, where: str, at: tuple = ()) -> dict[tuple, int]:
    """Path of keys and list indices -> line number in the file; refuses a key that is there twice or is no text."""
    found = {at: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise JointoptError(
                    f"{where}, line {line}: found a key in braces or brackets; allowed: text, in quotes"
                )
            below = (*at, key.value)
            if key.tag not in _TEXT:
                told = "found a key that YAML takes for a number, a truth value or the like; allowed: text, in quotes"
                raise JointoptError(f"{where}, line {line}: {dotted(below)}: {told}")
            if below in found:
                raise JointoptError(f"{where}, line {line}: {dotted(below)}: found twice; allowed: once")
            found |= {**lines_of(value, where, below), below: line}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found |= lines_of(value, where, (*at, index))
    return found


def dotted(at: tuple) -> str:
    return ".".join(map(str, at))
