"""From a config's `train:` to the recipe that it describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jointopt.installed import lacking
from jointopt.training.distillation import NUMBERS, Distillation, check_teacher
from jointopt.training.lora import check_targets
from jointopt.training.recipe import Recipe
from jointopt.training.sampling import SAMPLERS, Attentive, Sampling
from jointopt.training.sampling.attentive import beyond_limits
from jointopt.training.teachers import check_given_alike
from quant.errors import JointoptError, said_of
from search_spaces.family import has_module

if TYPE_CHECKING:
    from torch import nn

    from jointopt.config.config import Config
    from jointopt.models import LoadedModel
    from jointopt.supernet.supernet import Supernet

TEACHER = "train.distill.teacher"


def recipe_of(config: Config, supernet: Supernet, loaded: LoadedModel) -> Recipe:
    """The recipe; a teacher is loaded beside the model.

    Raises:
        JointoptError: a teacher that cannot be loaded, has other labels, or was given other tokens or images than the
            model is; whatever does not fit the super-network.
    """
    wanted = config.train
    assert wanted is not None
    distillation = None
    if wanted.distill:
        numbers = {name: getattr(wanted.distill, name) for name in NUMBERS}
        distillation = Distillation(**numbers, teacher=_checked_teacher(config, supernet, loaded))
    recipe = Recipe(
        _sampling(config, supernet), distillation, wanted.precision_from, wanted.learned_ranges, seed=config.search.seed
    )
    recipe.check(supernet)
    return recipe


def _checked_teacher(config: Config, supernet: Supernet, loaded: LoadedModel) -> nn.Module | None:
    teacher = teacher_of(config, loaded.task, str(supernet.device))
    if teacher is None:
        return None
    check_teacher(supernet.model, teacher.model, TEACHER)
    with said_of(TEACHER, in_place_of="model: "):
        check_given_alike(loaded, teacher, supernet.samples[0])
    return teacher.model


def teacher_of(config: Config, task: str, device: str) -> LoadedModel | None:
    """The other model that a config trains to agree with; None where it names none.

    Raises:
        JointoptError: it cannot be loaded, or lacks weights: it would teach what they are drawn as.
    """
    from jointopt.models import load_model

    if config.train is None or not config.train.distill or config.train.distill.teacher is None:
        return None
    with said_of(TEACHER, in_place_of="model: "):
        loaded = load_model(config.train.distill.teacher, task, device, config.dtype)
        if loaded.untrained:
            raise JointoptError(
                f"model: {loaded.source.name!r} has no weights for {', '.join(loaded.untrained[:4])}; allowed: a model "
                f"fine-tuned for {loaded.task}"
            )
        return loaded


HEADS = ("pre_classifier", "classifier", "cls_classifier", "distillation_classifier", "score", "fc", "head")


def lora_of(config: Config, supernet: Supernet, loaded: LoadedModel) -> Any:
    """The `peft.LoraConfig` of a config, None where it has none. Heads are trained whole, and so are modules for which
    the checkpoint had not all weights, such as a pooler.

    Raises:
        JointoptError: peft is missing, or a layer that is named.
    """
    assert config.train is not None
    wanted = config.train.lora
    if wanted is None:
        return None
    if told := lacking("lora"):
        raise JointoptError(f"train.lora: found {told}")
    from peft import LoraConfig

    check_targets(supernet.model, wanted.targets, "train.lora.targets")
    heads = [name for name in HEADS if has_module(supernet.model, name)]
    new = {name.rpartition(".")[0] for name in loaded.untrained if "." in name}
    return LoraConfig(
        r=wanted.rank,
        lora_alpha=wanted.alpha,
        target_modules=list(wanted.targets),
        modules_to_save=sorted({*heads, *new}) or None,
    )


def _sampling(config: Config, supernet: Supernet) -> Sampling:
    assert config.train is not None
    count = config.train.random_subnetworks
    if config.train.sampling == "attentive":
        return Attentive(count, region=beyond_limits(supernet, config.constraints or {}))
    return SAMPLERS[config.train.sampling](count)
