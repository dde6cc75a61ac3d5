"""Packages, and jointopt's rooms (a folder or a module of it), import in one direction, those inside functions too."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant", "search_spaces", "jointopt")


def imported(source: str) -> Iterator[str]:
    """What a module imports, by its full name, but for what type checkers alone read."""
    tree = ast.parse(source)
    for node in [each for each in ast.walk(tree) if isinstance(each, ast.If)]:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{each.name}" for each in node.names)


def room_of(name: str) -> str:
    package, *inside = name.split(".")
    return f"{package}.{inside[0]}" if package == "jointopt" and inside else package


def test_rooms_import_in_no_circle():
    rooms: dict[str, set[str]] = defaultdict(set)
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        rooms[room] |= {each for each in map(room_of, imported(path.read_text())) if each.startswith(PACKAGES)} - {room}
    order = list(TopologicalSorter(rooms).static_order())  # raises CycleError, which names the rooms
    assert order.index("quant") < order.index("search_spaces") < order.index("jointopt.cost")
    assert order.index("jointopt.cost") < order.index("jointopt.supernet") < order.index("jointopt.training")
