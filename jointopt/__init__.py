"""jointopt: search a pretrained model's architecture and its layers' number formats together.

Everything a user may touch is named in `__all__`. Names are imported when first used, so that spaces, strategies,
studies and the command's help come without the seconds that torch takes to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Gene": "search_spaces.space",
    "SearchSpace": "search_spaces.space",
    "Family": "search_spaces.family",
    "Block": "search_spaces.family",
    "Branch": "search_spaces.family",
    "SkipAttention": "search_spaces.stand_ins",
    "SkipBranch": "search_spaces.stand_ins",
    "SkipPostNormAttention": "search_spaces.stand_ins",
    "SkipPostNormOutput": "search_spaces.stand_ins",
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
    "export": "jointopt.checkpoint.exporting",
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


if TYPE_CHECKING:  # for type checkers, which do not see what is imported by its name
    from jointopt import strategies as strategies
    from jointopt.checkpoint.exporting import export as export
    from jointopt.checkpoint.verification import verify as verify
    from jointopt.config.config import load_config as load_config
    from jointopt.cost.device import load_device as load_device
    from jointopt.cost.expected import expected_cost as expected_cost
    from jointopt.cost.roofline import Roofline as Roofline
    from jointopt.finishing.finishing import Finished as Finished
    from jointopt.finishing.finishing import finish as finish
    from jointopt.loop.loop import search as search
    from jointopt.objectives import Constraint as Constraint
    from jointopt.objectives import Objective as Objective
    from jointopt.report.page import write_report as write_report
    from jointopt.study.rescoring import rescore_finished as rescore_finished
    from jointopt.study.rescoring import rescore_front as rescore_front
    from jointopt.study.study import Study as Study
    from jointopt.supernet.supernet import Supernet as Supernet
    from jointopt.timing.fitted import fit_roofline as fit_roofline
    from jointopt.timing.lookup import Lookup as Lookup
    from jointopt.training.distillation import Distillation as Distillation
    from jointopt.training.elastic import elastic_loss as elastic_loss
    from jointopt.training.loop import train_supernet as train_supernet
    from jointopt.training.recipe import Recipe as Recipe
    from jointopt.training.trainer import ElasticTrainer as ElasticTrainer
    from quant.errors import JointoptError as JointoptError
    from quant.formats import ELEMENTS as ELEMENTS
    from quant.formats import SCHEMES as SCHEMES
    from quant.formats import Element as Element
    from quant.formats import Format as Format
    from quant.formats import Scheme as Scheme
    from search_spaces.family import Block as Block
    from search_spaces.family import Branch as Branch
    from search_spaces.family import Cache as Cache
    from search_spaces.family import Family as Family
    from search_spaces.family import Layer as Layer
    from search_spaces.family import Link as Link
    from search_spaces.family import Part as Part
    from search_spaces.family import Stream as Stream
    from search_spaces.family import Width as Width
    from search_spaces.space import Gene as Gene
    from search_spaces.space import SearchSpace as SearchSpace
    from search_spaces.stand_ins import SkipAttention as SkipAttention
    from search_spaces.stand_ins import SkipBranch as SkipBranch
    from search_spaces.stand_ins import SkipPostNormAttention as SkipPostNormAttention
    from search_spaces.stand_ins import SkipPostNormOutput as SkipPostNormOutput
else:

    def __getattr__(name: str) -> Any:
        if name == "strategies":
            return import_module("jointopt.strategies")
        if name not in _HOME:
            raise AttributeError(f"module 'jointopt' has no attribute {name!r}; public: {', '.join(__all__)}")
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
