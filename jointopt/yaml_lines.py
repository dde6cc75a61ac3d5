"""Where a YAML file says what, which PyYAML does not tell with the values; a key that is there twice is refused."""

from __future__ import annotations

from pathlib import Path

import yaml

from jointopt.config_complaints import dotted
from quant.errors import JointoptError


def lines_of(node: yaml.Node, path: str | Path, at: tuple = ()) -> dict[tuple, int]:
    """Path of keys and list indices -> line number in the file; refuses a key that is there twice."""
    found = {at: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise JointoptError(f"{path}, line {line}: found a key in braces or brackets; allowed: text, in quotes")
            below = (*at, key.value)
            if below in found:
                raise JointoptError(f"{path}, line {line}: {dotted(below)}: found twice; allowed: once")
            found |= {**lines_of(value, path, below), below: line}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found |= lines_of(value, path, (*at, index))
    return found
