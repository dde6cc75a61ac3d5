"""What `ElasticTrainer` is given: what of it is refused, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainingArguments

from jointopt.supernet.importance import trains_others
from jointopt.supernet.supernet import Supernet
from jointopt.training.recipe import Recipe, TaskLoss
from quant.errors import JointoptError
from search_spaces.families import Declare
from search_spaces.space import SearchSpace


def smoothed(recipe: Recipe, smoothing: float) -> Recipe:
    """The recipe with the labels of its loss smoothed."""
    if not smoothing:
        return recipe
    if recipe.loss != TaskLoss():
        raise JointoptError(
            f"args: label_smoothing_factor {smoothing} beside a loss that is not of one class; allowed: 0 (a recipe's "
            "own loss may smooth)"
        )
    return replace(recipe, loss=TaskLoss(smoothing))


def check_args(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Raises JointoptError for what the Trainer does elsewhere and would do wrong, or not at all, here."""
    if args.fp16:
        raise JointoptError("args: fp16, in which gradients of small sub-networks vanish; allowed: bf16, or neither")
    if args.bf16_full_eval or args.fp16_full_eval:
        raise JointoptError(
            "args: bf16_full_eval or fp16_full_eval, which leave the super-network in 16 bits; allowed: bf16, with "
            "which evaluation computes so too"
        )
    if args.n_gpu > 1:
        raise JointoptError(
            f"args: {args.n_gpu} GPUs in one process, over which the Trainer splits batches by DataParallel; allowed: "
            "one (CUDA_VISIBLE_DEVICES=0), or a process for each (accelerate launch)"
        )
    if args.fsdp or args.deepspeed:
        raise JointoptError("args: fsdp or deepspeed, which keep parts of the weights; allowed: data parallelism")
    if args.torch_compile:
        raise JointoptError("args: torch_compile, which compiles blocks anew for each width; allowed: False")
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise JointoptError("args: gradient_checkpointing_kwargs use_reentrant True; allowed: False")
    if options.get("model_init") is not None:
        raise JointoptError("model_init: found one; allowed: model=, or supernet=, of which the trainer is made")
    if options.get("compute_loss_func") is not None:
        raise JointoptError("compute_loss_func: is not called here; allowed: recipe=Recipe(loss=...)")


def check_checkpointing(args: TrainingArguments, model: nn.Module) -> None:
    """Raises JointoptError for gradient checkpointing of a model that says it has none, or without a method by which
    the Trainer asks for it."""
    if not args.gradient_checkpointing:
        return
    names, kind = ("activation_checkpointing_enable", "gradient_checkpointing_enable"), type(model).__name__
    if not any(hasattr(model, name) for name in names):
        raise JointoptError(
            f"args: gradient_checkpointing True, for which a {kind} has no {names[0]}; allowed: False"
            + (", and its own set_grad_checkpointing()" if hasattr(model, "set_grad_checkpointing") else "")
        )
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise JointoptError(f"args: gradient_checkpointing True, which a {kind} does not support; allowed: False")


def supernet_of(model: Any, space: SearchSpace | None, supernet: Supernet | None, family: Declare | None) -> Supernet:
    """The one that is given, or one of the model."""
    if supernet is not None:
        if not isinstance(supernet, Supernet):
            raise JointoptError(
                f"supernet: found a {type(supernet).__name__}; allowed: a Supernet, or model= and space="
            )
        if model is not None or space is not None:
            raise JointoptError("supernet: given beside a model or a space; allowed: it alone, or these")
        return supernet
    if isinstance(model, Supernet):
        raise JointoptError("model: found a super-network; allowed: supernet=, or the model that it was made of")
    return Supernet(model, space or SearchSpace.for_model(model, family=family), family=family)


def check_optimizer(optimizer: Any, supernet: Supernet) -> None:
    """Raises JointoptError for an optimizer of the model that was copied, which would train nothing."""
    if optimizer is not None and trains_others(optimizer, supernet.model):
        raise JointoptError(
            "optimizers: found one of other parameters than the super-network's, whose model is a copy; allowed: one "
            "of supernet.model.parameters(), with supernet= in place of model, or optimizer_cls_and_kwargs"
        )
