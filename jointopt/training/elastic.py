"""The loss of one super-network step: the largest sub-network on the task, the sampled ones distilled from it.

loss = jointopt.elastic_loss(supernet, batch, step)      # in a training loop of one's own
accelerator.backward(loss)

Sub-networks run one after the other, each forward and backward before the next, so that the activations of one at a
time are in memory. Their gradients are summed as they come, and the loss that is returned hands the sum on when it is
itself gone back from: accumulation, loss scaling and clipping work as with any loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.batches import Batch, check_batch, on_device, without_labels
from jointopt.digests import digest_of
from jointopt.evaluation.evaluation import check_supernet
from jointopt.names import LEARNED_RANGES
from jointopt.outputs import IGNORED, problem_of, without_cache
from jointopt.supernet.batch_norm import running_statistics
from jointopt.supernet.subnetwork import Plan
from jointopt.training.distillation import (
    Distillation,
    ModelOutputs,
    TeacherOutputs,
    check_one_class,
    loss_of,
    model_outputs,
    teacher_logits,
    teacher_outputs,
)
from jointopt.training.gradient_sums import GradientSums
from jointopt.training.recipe import Recipe, checked
from jointopt.training.sampling import step_seed
from quant.errors import JointoptError, check_count, check_whole

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet


def elastic_loss(
    supernet: Supernet, batch: Batch, step: int, recipe: Recipe | None = None, steps: int | None = None
) -> Tensor:
    """The loss of one step, a scalar whose backward pass gives the super-network's parameters their gradients.

    The work of all backward passes is done here already. Where torch.distributed has several processes, each with its
    own part of the batch, they sample the same sub-networks, and gradients and BatchNorm's running statistics are
    averaged over them. Parameters that need no gradient get none.

    Args:
        supernet: calibrated; after training calibrate it again. Its `model.parameters()` are for the optimizer.
        batch: the model's inputs, and "labels".
        step: number of the optimizer's step, from 0: what is sampled depends on it (and on the recipe's seed) alone.
        recipe: see `Recipe`.
        steps: how many there will be; what progressive sampling and `precision_from` count by.

    Raises:
        JointoptError: the super-network is not calibrated, the batch has no labels, `steps` is missing or passed, the
            loss is not finite.
    """
    recipe = checked(recipe) or USUAL
    check_supernet("train", supernet)
    if _CHECKED.get(supernet) is not recipe or not supernet.trained:
        recipe.check(supernet)
        if supernet not in _CHECKED:
            _check_alike(supernet)
        _CHECKED[supernet] = recipe
    if recipe.learned_ranges and LEARNED_RANGES not in supernet.model._parameters:
        raise JointoptError("learned_ranges: call supernet.learn_ranges() before the optimizer is made")
    progress = _progress(step, steps, recipe)
    losses, sums = gradients_of(supernet, batch, step, progress, recipe)
    _average_statistics(supernet.model)
    total = torch.stack(losses).sum()
    if not torch.is_grad_enabled():
        return total
    return _Gathered.apply(total, sums.gradients, *sums.parameters)


USUAL = Recipe()
_CHECKED: WeakKeyDictionary[Supernet, Recipe] = WeakKeyDictionary()
"""What each super-network was found to be trainable with."""


def _progress(step: int, steps: int | None, recipe: Recipe) -> float:
    check_whole("step", step)
    check_count("steps", steps)
    if steps is None:
        if recipe.precision_from not in (None, 0, 0.0) or getattr(recipe.strategy, "counts_steps", False):
            raise JointoptError("steps: found none; this recipe counts by their number; allowed: how many there are")
        return 0.0
    if step >= steps:
        raise JointoptError(f"step: found {step} of {steps}; allowed: 0 to {steps - 1}")
    return step / steps


def gradients_of(
    supernet: Supernet, batch: Batch, step: int, progress: float, recipe: Recipe
) -> tuple[list[Tensor], GradientSums]:
    """The losses of the largest and of each sampled sub-network, and the sums of their gradients."""
    recipe = recipe.suited(supernet.model)
    kind = supernet.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        raise JointoptError("train: found float16 autocast, in which gradients vanish; allowed: bfloat16, or none")
    batch = _labelled(batch, supernet.device)
    parameters = [each for each in supernet.model.parameters() if each.requires_grad]
    if not parameters:
        raise JointoptError("train: no parameter of the model needs a gradient; allowed: one or more")
    supernet.weights_changed()
    sums, losses, teacher = GradientSums(parameters), [], None
    with _without_hooks(parameters), without_cache(supernet.model):
        for student in _students(supernet, step, progress, recipe):
            view = supernet.view_to_train(student.plan, student.precision)
            leaves = sums.leaves_of(view, batch)
            loss, shown = _loss(supernet, student, view, batch, teacher, recipe)
            if not torch.isfinite(loss):
                raise JointoptError(f"train: the loss is {loss.item()}; a smaller learning_rate may help")
            sums.add(loss, leaves)
            losses.append(loss.detach())
            if recipe.distillation is not None and teacher is None:
                teacher = teacher_outputs(shown, recipe.distillation.temperature, problem_of(supernet.model))
            del loss, shown, view, leaves  # the next one's activations take their memory
    supernet.weights_changed()  # as soon as the optimizer steps: what was quantized here is of the weights before
    return losses, sums


@contextmanager
def _without_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hooks on gradients (`Tensor.register_hook`) are for the whole ones, as they come from the loss of the step."""
    held = {each: hooks for each in parameters if (hooks := each._backward_hooks)}
    for each in held:
        each._backward_hooks = None
    try:
        yield
    finally:
        for each, hooks in held.items():
            each._backward_hooks = hooks


def _labelled(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch on the device, its labels as a tensor."""
    check_batch("train", batch)
    labels = batch.get("labels")
    if labels is None:
        raise JointoptError(f"train: a batch has no 'labels'; found {', '.join(batch)}")
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise JointoptError(f"train: labels: found {labels!r:.60}; allowed: a tensor, or an array of numbers") from None
    return on_device({**batch, "labels": labels}, device)


@dataclass(frozen=True)
class _Student:
    plan: Plan
    precision: bool


def _students(supernet: Supernet, step: int, progress: float, recipe: Recipe) -> list[_Student]:
    """The largest sub-network first, which every other one may learn from."""
    genomes = recipe.strategy.genomes(supernet.space, progress, step_seed(recipe.seed, step))
    if genomes is None or (len(genomes) and np.ndim(genomes) != 2):
        raise JointoptError(f"sampling: found {genomes!r} in place of genomes; allowed: a list of them")
    precision = recipe.precision_from is not None and progress >= recipe.precision_from
    largest = _Student(supernet.plan(supernet.space.largest), False)
    return [largest, *(_Student(supernet.plan(genome), precision) for genome in genomes)]


def _loss(
    supernet: Supernet, student: _Student, view: nn.Module, batch: Batch, teacher: TeacherOutputs | None, recipe: Recipe
) -> tuple[Tensor, ModelOutputs]:
    """Of one sub-network; of the largest where there is no teacher yet."""
    wanted = recipe.distillation
    inputs = without_labels(batch)
    shown = model_outputs(view, inputs, supernet.family, student.plan, wanted or Distillation())
    if wanted is None:
        return _task_loss(recipe, shown.logits, batch), shown
    counted = _counted(recipe, shown.logits, batch["labels"])
    if teacher is not None:
        loss = loss_of(shown, teacher, batch, wanted, counted)
        return (loss + wanted.labels * _task_loss(recipe, shown.logits, batch) if wanted.labels else loss), shown
    loss = _task_loss(recipe, shown.logits, batch)
    problem = problem_of(supernet.model)
    if problem is None:
        check_one_class(shown.logits, batch["labels"])
    if wanted.teacher is not None:
        given = ModelOutputs(teacher_logits(wanted.teacher, inputs))
        if given.logits.shape != shown.logits.shape:
            raise JointoptError(
                f"teacher: its logits are {list(given.logits.shape)}, the model's {list(shown.logits.shape)}; allowed: "
                "the same"
            )
        loss = loss + loss_of(shown, teacher_outputs(given, wanted.temperature, problem), batch, wanted, counted)
        shown.logits = given.logits
    return loss, shown


def _counted(recipe: Recipe, logits: Tensor, labels: Tensor) -> Tensor | None:
    """Which of the next tokens have a label: where the task's loss counts nothing, as in a prompt, nothing is distilled
    either, and both parts of the loss weigh alike in a step that accumulates batches."""
    of_tokens = labels.dim() == 2 and logits.dim() == 3 and labels.shape == logits.shape[:2]
    if not of_tokens or not recipe.is_usual:
        return None
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def _task_loss(recipe: Recipe, logits: Tensor, batch: Batch) -> Tensor:
    """The recipe's loss, a scalar from which gradients reach the logits."""
    try:
        loss = recipe.loss(logits, batch)
    except TypeError as error:
        raise JointoptError(
            f"loss: {error}; allowed: a function of logits and batch, such as lambda logits, batch: criterion(logits, "
            'batch["labels"])'
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise JointoptError(f"loss: returned {found}; allowed: a tensor of one number")
    if logits.requires_grad and not loss.requires_grad:
        raise JointoptError("loss: returned a number that no gradient can go back from; allowed: one of the logits")
    return loss.reshape(())


class _Gathered(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (scale,) = outputs  # of each process its own: batches differ in how many labels count
        gradients = _averaged([None if each is None else each * scale for each in ctx.gradients])
        return None, None, *gradients


def _averaged(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Over the processes of torch.distributed, which all have the same sub-networks and so the same gaps."""
    count = processes()
    for each in gradients if count > 1 else ():
        if each is not None:
            torch.distributed.all_reduce(each)
            each /= count
    return gradients


@torch.no_grad()
def _average_statistics(model: nn.Module) -> None:
    """BatchNorm's running ones, over the processes: each has moved them by its own part of the batch."""
    count = processes()
    held = [each for pair in running_statistics(model).values() for each in pair] if count > 1 else []
    if held:
        together = torch.cat(held)
        torch.distributed.all_reduce(together)
        for each, mean in zip(held, (together / count).split([len(each) for each in held]), strict=True):
            each.copy_(mean)


def _check_alike(supernet: Supernet) -> None:
    """Raises JointoptError where processes hold other weights, or channels and blocks in another order, whose gradients
    would be averaged all the same."""
    if processes() == 1:
        return
    held: list[Any] = [None] * processes()
    order = ", ".join(f"{name}: {blocks}" for name, blocks in sorted(supernet.leaving.items()))
    torch.distributed.all_gather_object(held, f"{digest_of([supernet.model.state_dict()])} {order}")
    if len(set(held)) > 1:
        raise JointoptError(
            "train: the processes hold super-networks of other weights; allowed: in each the same model and adapters, "
            "calibrated on the same batches"
        )


def processes() -> int:
    """Of torch.distributed."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1
