"""What a study holds beside its evaluations: that it is of the search that goes on, and by which software."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jointopt.study.differences import differing
from quant.errors import JointoptError

_SOFTWARE = ("jointopt", "torch", "transformers", "timm", "compressed-tensors", "deap", "numpy")


def check_config(path: Path | None, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises JointoptError where a search is another than the one that the study at `path` is of; says how."""
    facts = differing({**stored, "config": None}, {**wanted, "config": None})
    config = differing(stored["config"] or {}, wanted["config"])
    if facts or config:
        told = "; ".join(filter(None, (facts, config)))
        raise JointoptError(f"study {str(path)!r} has another config: {told}; allowed: that one, or another storage")


def software() -> dict[str, str]:
    """The versions of what results depend on."""
    found = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
