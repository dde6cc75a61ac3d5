"""jointopt: search a pretrained model's architecture and its layers' number formats together.

Everything a user may touch is named in `__all__`. Names are imported when first used, so that a search over a
space without any model needs neither torch nor transformers at start-up.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Gene": "search_spaces.space",
    "SearchSpace": "search_spaces.space",
    "Objective": "jointopt.objectives",
    "Study": "jointopt.study",
    "Supernet": "jointopt.supernet",
    "JointoptError": "quant.errors",
    "search": "jointopt.loop",
    "export": "jointopt.checkpoint.writer",
    "verify": "jointopt.checkpoint.verification",
    "load_config": "jointopt.config",
    "write_report": "jointopt.report.page",
    "train_sandwich": "jointopt.training.sandwich",
    "strategies": "",
}

__all__ = [
    "Gene",
    "JointoptError",
    "Objective",
    "SearchSpace",
    "Study",
    "Supernet",
    "export",
    "load_config",
    "search",
    "strategies",
    "train_sandwich",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jointopt' has no attribute {name!r}; public: {', '.join(__all__)}")
    if name == "strategies":
        return import_module("jointopt.strategies")
    return getattr(import_module(_HOME[name]), name)
