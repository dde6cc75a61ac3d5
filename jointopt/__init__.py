"""jointopt: search a pretrained model's architecture and its layers' number formats together.

Everything a user may touch is named in `__all__`. Names are imported when first used, so that spaces, strategies,
studies and the command's help come without the seconds that torch takes to load.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Gene": "search_spaces.space",
    "SearchSpace": "search_spaces.space",
    "Family": "search_spaces.family",
    "Block": "search_spaces.family",
    "Branch": "search_spaces.family",
    "SkipAttention": "search_spaces.family",
    "SkipBranch": "search_spaces.family",
    "SkipPostNormAttention": "search_spaces.family",
    "SkipPostNormOutput": "search_spaces.family",
    "Width": "search_spaces.family",
    "Part": "search_spaces.family",
    "Layer": "search_spaces.family",
    "Link": "search_spaces.family",
    "Stream": "search_spaces.family",
    "Cache": "search_spaces.family",
    "ELEMENTS": "quant.formats",
    "SCHEMES": "quant.formats",
    "Element": "quant.formats",
    "Format": "quant.formats",
    "Scheme": "quant.formats",
    "Constraint": "jointopt.objectives",
    "Objective": "jointopt.objectives",
    "Study": "jointopt.study.study",
    "Supernet": "jointopt.supernet.supernet",
    "JointoptError": "quant.errors",
    "search": "jointopt.loop.loop",
    "finish": "jointopt.finishing.finishing",
    "Finished": "jointopt.finishing.finishing",
    "export": "jointopt.checkpoint.writer",
    "verify": "jointopt.checkpoint.verification",
    "rescore_finished": "jointopt.study.rescoring",
    "rescore_front": "jointopt.study.rescoring",
    "load_config": "jointopt.config.config",
    "write_report": "jointopt.report.page",
    "Lookup": "jointopt.timing.lookup",
    "Roofline": "jointopt.cost.roofline",
    "fit_roofline": "jointopt.timing.fitted",
    "expected_cost": "jointopt.cost.expected",
    "load_device": "jointopt.cost.device",
    "train_supernet": "jointopt.training.loop",
    "elastic_loss": "jointopt.training.elastic",
    "Recipe": "jointopt.training.recipe",
    "Distillation": "jointopt.training.distillation",
    "ElasticTrainer": "jointopt.training.trainer",
}

__all__ = ["strategies", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return import_module("jointopt.strategies")
    if name not in _HOME:
        raise AttributeError(f"module 'jointopt' has no attribute {name!r}; public: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
