"""The READMEs' code blocks, by section and language."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parent.parent
README, MEASURED = "README.md", "scripts/bench/README.md"


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line in the file."""

    section: str
    language: str
    text: str
    line: int


def blocks(language: str, file: str = README) -> list[Block]:
    """The blocks of a language, in their order."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = []
    for fence in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        heading = re.findall(r"^## (.*)$", text[: fence.start()], re.MULTILINE)
        line = text.count("\n", 0, fence.start(2)) + 1
        found.append(Block(heading[-1] if heading else "", fence[1], fence[2], line))
    return [block for block in found if block.language == language]


def code(section: str) -> str:
    """All Python of a section."""
    return "\n".join(block.text for block in blocks("python") if block.section == section)


def own_model() -> SimpleNamespace:
    """The names that the section on a model of one's own leaves behind: mixer, declare, space, supernet."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "own"}
    exec(compile(code("A model of your own"), README, "exec"), names)
    return SimpleNamespace(**names)


def table(*header: str) -> list[list[str]]:
    """The cells of the table that begins with these columns, without its header."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| " + " | ".join(header)))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows
