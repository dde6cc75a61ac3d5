"""A benchmark's command line, some of its measures, and what it finds: told as it comes, then as one table, and kept
as JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn


def command_line(
    description: str | None, assets: bool = False, work: str | None = None, rows: bool = True
) -> argparse.ArgumentParser:
    """A parser with what several benchmarks have: --json for its rows, --assets, and --work with this default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rows:
        parser.add_argument("--json", type=Path, help="where the rows go: case, measure, value, aim, better")
    if assets:
        parser.add_argument("--assets", type=Path, default=Path("assets"), help="of scripts/assets.py")
    if work is not None:
        parser.add_argument("--work", type=Path, default=Path(work), help="where what is made is kept")
    return parser


class Measures:
    """One row a measure of a case: its value, what is aimed at if anything, and whether "lower" or "higher" is better.

    A value is a number, or words where there is none ("over 100").

    Args:
        path: of the JSON file, written anew with each row; None for none.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def tell(self, case: str, measure: str, value: float | str, aim: float | None, better: str) -> None:
        print(f"{case}: {measure} {shown(value)}", flush=True)
        self.keep(case, measure, value, aim, better)

    def keep(self, case: str, measure: str, value: float | str, aim: float | None, better: str) -> None:
        """A row that the benchmark itself shows."""
        self.rows.append({"case": case, "measure": measure, "value": value, "aim": aim, "better": better})
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1))

    def table(self, title: str | None = None) -> Table:
        table = Table("case", "measure", "value", "aim", title=title)
        for row in self.rows:
            aim = "" if row["aim"] is None else shown(row["aim"])
            table.add_row(row["case"], row["measure"], shown(row["value"]), aim)
        return table


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def seconds(run: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def resident(which: str = "VmRSS") -> float:
    """VmRSS, what is resident now, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def divergence(found: Tensor, given: Tensor) -> float:
    """KL of what logits [tokens, vocabulary] say from what is given, in nats a token."""
    found, given = found.log_softmax(-1), given.log_softmax(-1)
    return float(nn.functional.kl_div(found, given, log_target=True, reduction="none").sum(-1).mean())
