"""LoRA on a super-network: adapters that are sliced with it, and merged before it is searched (arXiv 2106.09685).

PEFT finds the layers, initializes the adapters and says their scale; here they become parameters of the super-network's
own layers (`jointopt.supernet.adapters`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from jointopt.arithmetic import own_arithmetic
from jointopt.installed import lacking
from jointopt.names import ADAPTERS
from jointopt.supernet.adapters import adapted, effective, take_off
from quant.errors import JointoptError, did_you_mean, in_one_line
from search_spaces.clones import structural_clone
from search_spaces.family import has_module

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet


def attach(supernet: Supernet, config: Any) -> list[str]:
    """Freezes a super-network but for adapters of the layers that a `peft.LoraConfig` names.

    Args:
        config: rank, scale, target_modules; what PEFT makes of modules_to_save and task_type is trained whole (weights
            that modules share stay shared). Without dropout and DoRA, which are no part of a weight.

    Returns:
        Paths of the layers with an adapter.

    Raises:
        JointoptError: peft is not installed, targets or modules_to_save that the model lacks, targets that share their
            weight with another layer, an option that cannot be sliced, adapters that are there already.
    """
    _check_config(config)
    if adapted(supernet.model):
        raise JointoptError("lora: the super-network has adapters already; allowed: one set")
    frozen = {name for name, each in supernet.model.named_parameters() if not each.requires_grad}
    try:
        found, whole = _wrapped(supernet.model, config)
    finally:  # PEFT freezes the clone's parameters, which are the model's
        _freeze(supernet.model, frozen)
    tied = {path for layer in supernet.family.layers if layer.tied for path in layer.paths}
    if shared := sorted(tied & set(found)):
        raise JointoptError(f"lora: {shared[0]} shares its weight with another layer; allowed: layers with their own")
    supernet.frozen = frozen
    supernet.model.requires_grad_(False)
    for path in whole:
        supernet.model.get_submodule(path).requires_grad_(True)
    for path, adapter in found.items():
        layer = supernet.model.get_submodule(path)
        weight = layer.get_parameter("weight")
        for name in ADAPTERS:
            value = getattr(adapter, name)["default"].weight.detach().to(weight.device)  # float32 beside bfloat16
            layer.register_parameter(name, nn.Parameter(value.clone()))
        layer.__dict__["lora_scale"] = float(adapter.scaling["default"])
    return list(found)


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
UNREAD = {
    *("bias", "lora_bias", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
}
"""Options of a `peft.LoraConfig` by which PEFT would train more than two matrices a layer, or other layers, or compute
with them otherwise."""


def _check_config(config: Any) -> None:
    if told := lacking("lora"):
        raise JointoptError(f"lora: found {told}")
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise JointoptError(f"lora: found {type(config).__name__}; allowed: a peft.LoraConfig")
    if config.lora_dropout or config.use_dora:
        raise JointoptError("lora: found lora_dropout or use_dora; allowed: neither, since adapters become weights")
    defaults = {each.name: each.default for each in fields(config)}
    for name in sorted(UNREAD & defaults.keys()):
        if (given := getattr(config, name)) != defaults[name]:
            raise JointoptError(
                f"lora: found {name}={given!r:.60}; allowed: {defaults[name]!r} (modules_to_save trains whole modules)"
            )


def _wrapped(model: nn.Module, config: Any) -> tuple[dict[str, Any], list[str]]:
    """Path -> what PEFT makes of the layer there, in a clone that shares the model's parameters; and the paths of the
    modules that it trains whole."""
    from peft import get_peft_model
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    targets = config.target_modules
    names = check_targets(model, () if targets is None or isinstance(targets, str) else targets)
    _check_saved(model, config)
    try:  # a copy, as PEFT adds to modules_to_save what the task_type has
        wrapped = get_peft_model(structural_clone(model), copy.deepcopy(config))
    except ValueError as error:
        raise JointoptError(f"lora: {in_one_line(error)}; allowed: {', '.join(names)}") from None
    made = {name.removeprefix("base_model.model."): module for name, module in wrapped.named_modules()}
    found: dict[str, Any] = {path: module for path, module in made.items() if isinstance(module, BaseTunerLayer)}
    if other := [path for path, module in found.items() if not isinstance(module, Linear)]:
        kind = type(model.get_submodule(other[0])).__name__
        raise JointoptError(f"lora: {other[0]} is a {kind}; allowed: target_modules that are Linear layers")
    if variants := [each for module in found.values() for each in module.lora_variant.values()]:
        raise JointoptError(f"lora: found a {type(variants[0]).__name__}; allowed: adapters that are two matrices")
    whole = [path for path, module in made.items() if isinstance(module, ModulesToSaveWrapper)]
    return found, [path for path in whole if has_module(model, path)]  # PEFT wraps again what is in one of them


def _check_saved(model: nn.Module, config: Any) -> None:
    """Raises JointoptError for modules_to_save that are none of the model's, by what PEFT goes by: how paths end."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    saved, key = config.modules_to_save, "lora: modules_to_save"
    if isinstance(saved, str) or not all(isinstance(name, str) for name in saved or ()):
        raise JointoptError(f"{key}: found {saved!r}; allowed: a list of names")
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    added = SEQ_CLS_HEAD_NAMES if config.task_type else ()  # by PEFT itself, to a config that it uses
    for wanted in saved or ():
        matching = [path for path in modules if wanted and path.endswith(wanted)]
        if not matching and wanted not in added:
            near = did_you_mean(wanted, (path.rpartition(".")[2] for path in modules))
            raise JointoptError(
                f"{key}: found {wanted!r}, in which no module's path ends{near}; allowed: "
                f"{', '.join(name for name, _ in model.named_children())}, or what is in them"
            )
        for path in matching:
            if isinstance(modules[path], CONTAINERS):
                kind = type(modules[path]).__name__
                raise JointoptError(f"{key}: {path} is a {kind}; allowed: modules that are called")


def _freeze(model: nn.Module, names: Collection[str]) -> None:
    """These parameters, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)


def check_targets(model: nn.Module, targets: Iterable[str], key: str = "lora: target_modules") -> list[str]:
    """The names that Linear layers end in. Raises JointoptError for a target that is none."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = sorted(set(map(_ending, linear)))
    for wanted in targets:
        if not any(path == wanted or path.endswith(f".{wanted}") for path in linear):
            raise JointoptError(
                f"{key}: found {wanted!r}, which is no Linear layer here, and others get no adapters"
                f"{did_you_mean(wanted, names)}; allowed: {', '.join(names)}"
            )
    return names


def _ending(path: str) -> str:
    """The last part of a path, with that before it where it is only a number: "fc1", "classifier.1"."""
    return re.search(r"[^.]*(\.\d+)*$", path)[0]  # type: ignore[index]


@torch.no_grad()
@own_arithmetic()
def merge(supernet: Supernet) -> None:
    """Makes adapters part of the weights for good, and trainable what was so before they came."""
    for layer in adapted(supernet.model).values():
        layer.get_parameter("weight").copy_(effective(layer))
        take_off(layer)
    _freeze(supernet.model, supernet.frozen)
    supernet.weights_changed()
