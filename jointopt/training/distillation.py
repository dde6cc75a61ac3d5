"""What a sub-network learns from its teacher: soft labels, hidden states, relations of attention.

Logits: Hinton et al., arXiv 1503.02531, with the largest sub-network as the teacher (in place: arXiv 1903.05134;
of pretrained transformers: InstaTune, arXiv 2308.15609). Where a sample may have several classes at once each is a
choice of two, and what a regression gives is learned as it is. Hidden states: TinyBERT, arXiv 1909.10351, equation
8, each block that stays with its own self in the largest. Attention: self-attention relations of the last layer
(MiniLMv2, arXiv 2012.15828, equation 5), which compare tokens with tokens, so that any number of heads fits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.batches import Batch
from jointopt.outputs import (
    MULTI_LABEL,
    REGRESSION,
    first_output,
    logits_of,
    problem_of,
    row_groups,
    without_cache,
)
from jointopt.supernet.subnetwork import Plan, renaming
from jointopt.tasks.labels import moved, named_otherwise
from jointopt.tasks.task import label_names
from quant.errors import JointoptError, check_above_0, check_number
from quant.formats import dtype_name
from search_spaces.family import Family, Width, within
from search_spaces.space import SearchSpace

NUMBERS = ("temperature", "hidden", "attention", "labels")


@dataclass(frozen=True)
class Distillation:
    """How sub-networks are distilled.

    Attributes:
        temperature: of both distributions; the divergence is multiplied by its square. A regression has none.
        hidden: weight of the mean squared difference of hidden states behind each block, relative to the teacher's
            mean square; 0 leaves it out.
        attention: weight of the divergence of query, key and value relations in the last attention layer; 0 leaves
            it out.
        labels: weight of the task's own loss on the sub-networks.
        teacher: a model of the same inputs and labels to learn the logits from in place of the largest sub-network,
            which then learns them too.
    """

    temperature: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    labels: float = 0.0
    teacher: nn.Module | None = None

    def __post_init__(self) -> None:
        check_above_0("distillation: temperature", self.temperature)
        for name in ("hidden", "attention", "labels"):
            check_number(f"distillation: {name}", getattr(self, name))
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise JointoptError(
                f"distillation: teacher: found a {type(self.teacher).__name__}; allowed: a torch.nn.Module"
            )

    def check(self, family: Family, space: SearchSpace, model: nn.Module) -> None:
        """Raises JointoptError for what this super-network cannot learn from."""
        if problem_of(model) == REGRESSION and self.temperature != 1:
            raise JointoptError(
                f"distillation: temperature: found {self.temperature} for a regression, which has no distribution; "
                "allowed: 1"
            )
        streams = [w.gene for w in family.widths if w.block is None and w.gene in space.names]
        if self.hidden and streams:
            raise JointoptError(f"distillation: hidden, but {streams[0]} narrows the hidden states; allowed: 0")
        if self.attention and not any(w.attention for w in family.widths):
            raise JointoptError(f"distillation: attention, of which a {family.name} has none; allowed: 0")
        if self.teacher is not None:
            check_teacher(model, self.teacher)


def are_probabilities(labels: Tensor) -> bool:
    """Whether each sample's labels [samples, classes, ...] add up to 1."""
    total = labels.detach().sum(1)
    return torch.allclose(total, torch.ones_like(total), atol=1e-2)


def check_one_class(logits: Tensor, labels: Any) -> None:
    """Raises JointoptError for labels of several classes at once, or measured values, of a model that does not say so:
    its logits would be taken for a distribution, and soft labels be blind to what they have in common."""
    if not isinstance(labels, Tensor) or logits.dim() != 2 or labels.shape != logits.shape:
        return
    if not labels.is_floating_point() or not are_probabilities(labels):
        raise JointoptError(
            f"distillation: found labels {dtype_name(labels.dtype)} {list(labels.shape)} that are no probabilities, so "
            f"that logits are no distribution; allowed: config.problem_type {MULTI_LABEL!r} or {REGRESSION!r} of a "
            "model of transformers, or Recipe(distillation=None)"
        )


def check_teacher(model: Any, teacher: Any, key: str = "teacher") -> None:
    """Raises JointoptError for a teacher whose outputs are not those of the model, or that is elsewhere."""
    for name in ("vocab_size", "num_labels", "num_classes"):
        own, other = (getattr(getattr(m, "config", m), name, None) for m in (model, teacher))
        if own != other:
            raise JointoptError(f"{key}: {name} is {other}, the model's {own}; allowed: the same")
    own, other = _classes(model), _classes(teacher)
    if len(own) == len(other):
        _check_names(own, other, key)
    own, other = (next((each.device for each in m.parameters()), None) for m in (model, teacher))
    if other not in (None, own):
        raise JointoptError(f"{key}: is on {other}, the model on {own}; allowed: the same device")


def _check_names(own: Sequence[str], other: Sequence[str], key: str) -> None:
    """ "neg" may be another one's "NEGATIVE", but not the place of its "pos"."""
    if (at := moved(own, other)) is not None:
        raise JointoptError(
            f"{key}: label {at} is {other[at]!r}, the model's {own[at]!r}; allowed: the same labels in the same order "
            "(config.id2label)"
        )
    if unlike := named_otherwise(own, other):
        at = unlike[0]
        warnings.warn(f"{key}: label {at} is {other[at]!r}, the model's {own[at]!r}: taken for the same", stacklevel=2)


def _classes(model: Any) -> list[str]:
    """The names of a model's classes; of one that is of no library none."""
    config = getattr(model, "config", None)
    known = hasattr(model, "num_classes") if config is None else hasattr(config, "id2label")
    return label_names(model) if known else []


@dataclass
class ModelOutputs:
    """What a forward pass showed: logits, hidden states by block, and the last attention's queries, keys, values."""

    logits: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)


@dataclass
class TeacherOutputs:
    """What sub-networks are compared with, made once for all of them.

    Attributes:
        outputs: log-probabilities [..., classes], where several classes may be right [samples, classes, 2]; of a
            regression its values.
        problem: `problem_of` the model.
    """

    outputs: Tensor
    problem: str | None = None
    hidden: dict[str, Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)


def teacher_outputs(shown: ModelOutputs, temperature: float, problem: str | None) -> TeacherOutputs:
    """What a teacher showed, without gradients and in float32, its distributions at a temperature.

    Args:
        problem: `problem_of` the model.

    Raises:
        JointoptError: a single output, which as a distribution is always 1.
    """
    outputs = shown.logits.detach()
    if problem == REGRESSION:
        outputs = outputs.float()
    elif outputs.shape[-1] == 1 and problem is None:
        raise JointoptError(
            "distillation: found logits of a single output, which are no distribution; allowed: two or more, "
            f"config.problem_type {REGRESSION!r} of a model of transformers, or none (Recipe(distillation=None))"
        )
    else:
        outputs = _log_probabilities(_choices(outputs, problem), temperature)
    hidden = {name: each.detach() for name, each in shown.hidden.items()}
    return TeacherOutputs(outputs, problem, hidden, [each.detach() for each in shown.attention])


def _choices(logits: Tensor, problem: str | None) -> Tensor:
    """Logits of what is chosen from, in the last dimension: of several classes at once, each is right or is not."""
    return torch.stack((logits, torch.zeros_like(logits)), -1) if problem == MULTI_LABEL else logits


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() if temperature == 1 else logits.float() / temperature).log_softmax(-1)


def model_outputs(view: nn.Module, inputs: Batch, family: Family, plan: Plan, wanted: Distillation) -> ModelOutputs:
    """Runs a training view and keeps what its distillation compares. The view is left without hooks."""
    found = ModelOutputs(torch.empty(0))
    renamed = renaming(family, plan)
    with ExitStack() as hooks:
        if wanted.hidden:
            for block in plan.blocks:
                hook = _keeper(found.hidden, block.name)
                hooks.enter_context(view.get_submodule(renamed(block.path)).register_forward_hook(hook))
        if wanted.attention and (width := _last_attention(family, plan)) is not None:
            for part in width.producers:
                hook = _appender(found.attention)
                hooks.enter_context(view.get_submodule(renamed(part.module)).register_forward_hook(hook))
        found.logits = logits_of(view, inputs)
    return found


def _keeper(store: dict[str, Tensor], name: str) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        store[name] = first_output(output)

    return hook


def _appender(store: list[Tensor]) -> Callable:
    return lambda module, args, output: store.append(output)


def _last_attention(family: Family, plan: Plan) -> Width | None:
    """The attention of the last block that has one."""
    gone = {path for branch in plan.dropped for path in branch.replacements}
    names = [block.name for block in plan.blocks]
    there = (width for width in family.widths if width.attention and width.block in names)
    staying = [width for width in there if not any(within(width.producers[0].module, path) for path in gone)]
    return max(staying, key=lambda width: names.index(width.block or ""), default=None)


def loss_of(
    student: ModelOutputs, teacher: TeacherOutputs, batch: Batch, wanted: Distillation, counted: Tensor | None
) -> Tensor:
    """The weighted sum of what a student is compared in, a scalar in float32.

    Args:
        counted: of logits [batch, tokens, ...] those whose divergence counts; None for those of tokens that are not
            masked.
    """
    mask = batch.get("attention_mask")
    total = _divergence(student.logits, teacher, mask if counted is None else counted, wanted.temperature)
    shared = [name for name in student.hidden if name in teacher.hidden]
    if wanted.hidden and shared:
        parts = [_difference(student.hidden[name], teacher.hidden[name], mask) for name in shared]
        total = total + wanted.hidden * torch.stack(parts).mean()
    if wanted.attention and student.attention and teacher.attention:
        pairs = zip(student.attention, teacher.attention, strict=True)
        total = total + wanted.attention * torch.stack([_relation_loss(s, t, mask) for s, t in pairs]).mean()
    return total


def soft_labels(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    problem: str | None = None,
) -> Tensor:
    """KL divergence of the student's from the teacher's distribution at a temperature, times its square, averaged over
    samples or, where `mask` [batch, tokens] fits, over unmasked tokens; of several classes at once that of each, right
    or not, averaged over them too; of a regression the mean squared difference."""
    return _divergence(student, teacher_outputs(ModelOutputs(teacher), temperature, problem), mask, temperature)


def _divergence(student: Tensor, teacher: TeacherOutputs, mask: Tensor | None, temperature: float) -> Tensor:
    if teacher.problem == REGRESSION:
        return nn.functional.mse_loss(student.float(), teacher.outputs)
    rows = teacher.outputs.shape[:-1]
    if mask is not None and mask.shape == rows and teacher.problem is None:
        weights = mask.float() / mask.sum().clamp(min=1)
    else:
        weights = torch.full(rows, 1 / rows.numel(), dtype=torch.float32, device=student.device)
    student = _choices(student, teacher.problem)
    return temperature**2 * _Divergence.apply(student, teacher.outputs, weights, temperature)


class _Divergence(torch.autograd.Function):
    """Weighted sum of the KL divergences of each row of logits from a teacher's, float32.

    Rows go one group after the other, as many as stay in a CPU's cache, each with its gradient: of a large vocabulary
    one tensor like the logits is kept, in place of four.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
        logits, targets, shares = student.flatten(0, -2), teacher.flatten(0, -2), weights.flatten()
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part in row_groups(len(logits), logits.shape[1], logits.device):
            own, target, share = _log_probabilities(logits[part], temperature), targets[part], shares[part]
            probabilities = target.exp()
            total += ((target - own).mul_(probabilities).sum(-1) * share).sum()
            if gradient is not None:
                gradient[part] = own.exp_().sub_(probabilities).mul_(share[:, None] / temperature)
        ctx.save_for_backward(*([] if gradient is None else [gradient.view_as(student)]))
        return total

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[Tensor | None, None, None, None]:
        return above[0] * ctx.saved_tensors[0], None, None, None


def _difference(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    student, teacher = student.float(), teacher.float()
    squares = _mean((student - teacher).square().mean(-1), mask)
    return squares / _mean(teacher.square().mean(-1), mask).clamp(min=1e-12)


def _relation_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Between [batch, tokens, channels] of any two numbers of channels."""
    of_student, of_teacher = (_relations(each.float(), mask) for each in (student, teacher))
    return _mean(nn.functional.kl_div(of_student, of_teacher, log_target=True, reduction="none").sum(-1), mask)


def _relations(x: Tensor, mask: Tensor | None) -> Tensor:
    scores = x @ x.mT / math.sqrt(x.shape[-1])
    if mask is not None and mask.shape == x.shape[:2]:
        scores = scores.masked_fill(~mask.bool()[:, None], torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.shape == values.shape:
        return (values * mask).sum() / mask.sum()
    return values.mean()


def teacher_logits(teacher: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """A given teacher's, without gradients, in eval mode; the teacher is left in the mode that it was in."""
    before = [module for module in teacher.modules() if module.training]
    teacher.eval()
    try:
        with torch.no_grad(), without_cache(teacher):
            return logits_of(teacher, inputs)
    except TypeError as error:
        raise JointoptError(
            f"teacher: does not take {', '.join(inputs)}: {error}; allowed: a model of the same inputs"
        ) from error
    finally:
        for module in before:
            module.training = True
