"""What a study holds beside its evaluations: that it is of the kinds it should be, and of the search that goes on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

from jointopt.study.differences import differing
from quant.errors import JointoptError

_SOFTWARE = ("jointopt", "torch", "transformers", "timm", "compressed-tensors", "deap", "numpy")
_KINDS = {
    "config": dict,
    "baselines": dict,
    "computed": list,
    "finished": list,
    "elapsed": Real,
    "threads": int,
    "choice": dict,
    "unseen": list,
}
_FINISHED = {"genome": list, "rounding": str, "metrics": dict}


def check_facts(path: Path | None, fact: Callable[[str, Any], Any]) -> None:
    """Raises JointoptError, by its key, for what was edited to something else.

    Args:
        fact: (key, default) -> what the study at `path` holds by it, the default for nothing.
    """

    def check(key: str, found: object, kind: type) -> None:
        if not isinstance(found, kind):
            raise JointoptError(f"study {str(path)!r}: is damaged: its {key} is {found!r:.60}")

    none = object()
    for key, kind in _KINDS.items():
        if (found := fact(key, none)) is not none:
            check(key, found, kind)
    baselines = fact("baselines", {})
    for name, metrics in ({"original": None} | baselines if baselines else {}).items():
        check(f"baselines.{name}", metrics, dict)
        for metric, value in metrics.items():
            check(f"baselines.{name}.{metric}", value, Real)
    for at, record in enumerate(fact("finished", ())):
        check(f"finished[{at}]", record, dict)
        for key, kind in _FINISHED.items():
            check(f"finished[{at}].{key}", record.get(key), kind)


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
