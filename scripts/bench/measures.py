"""What a benchmark finds: told as it comes, then as one table, and kept as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table


class Measures:
    """One row a measure of a case: its value, what is aimed at if anything, and whether "lower" or "higher" is better.

    Args:
        path: of the JSON file, written anew with each row; None for none.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def tell(self, case: str, measure: str, value: float, aim: float | None, better: str) -> None:
        print(f"{case}: {measure} {value:.4g}", flush=True)
        self.rows.append({"case": case, "measure": measure, "value": value, "aim": aim, "better": better})
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1))

    def table(self, title: str | None = None) -> Table:
        table = Table("case", "measure", "value", "aim", title=title)
        for row in self.rows:
            aim = "" if row["aim"] is None else f"{row['aim']:.4g}"
            table.add_row(row["case"], row["measure"], f"{row['value']:.4g}", aim)
        return table
