"""From a config's `train:` to the recipe that it describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jointopt.training.distillation import NUMBERS, Distillation
from jointopt.training.elastic import Recipe
from jointopt.training.sampling import STRATEGIES, Attentive, Sampling
from jointopt.training.sampling.attentive import beyond_limits

if TYPE_CHECKING:
    from jointopt.config import Config
    from jointopt.models import LoadedModel
    from jointopt.supernet import Supernet


def recipe_of(config: Config, supernet: Supernet, loaded: LoadedModel) -> Recipe:
    """The recipe; a teacher is loaded beside the model.

    Raises:
        JointoptError: a teacher that cannot be loaded or has other labels, whatever does not fit the super-network.
    """
    from jointopt.models import load_model

    wanted = config.train
    assert wanted is not None
    distillation = None
    if wanted.distill:
        numbers = {name: getattr(wanted.distill, name) for name in NUMBERS}
        given, teacher = wanted.distill.teacher, None
        if given is not None:
            teacher = load_model(given, loaded.task, str(supernet.device), config.dtype).model
        distillation = Distillation(**numbers, teacher=teacher)
    recipe = Recipe(_sampling(config, supernet), distillation, wanted.precision_from, seed=config.search.seed)
    recipe.check(supernet)
    return recipe


def _sampling(config: Config, supernet: Supernet) -> Sampling:
    assert config.train is not None
    count = config.train.random_subnetworks
    if config.train.sampling == "attentive":
        return Attentive(count, region=beyond_limits(supernet, config.constraints or {}))
    return STRATEGIES[config.train.sampling](count)
