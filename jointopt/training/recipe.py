"""How a super-network is trained: what is sampled, what it learns from, and the loss of the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jointopt.batches import Batch
from jointopt.evaluation.evaluation import check_supernet
from jointopt.outputs import IGNORED, MULTI_LABEL, REGRESSION, problem_of
from jointopt.training.distillation import Distillation, are_probabilities
from jointopt.training.sampling import Sampling, strategy_of
from quant.errors import JointoptError, check_number, check_whole
from quant.formats import dtype_name

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

Loss = Callable[[Tensor, Batch], Tensor]
NONE_COUNTED = f"train: in all steps no label counted, each was {IGNORED}: nothing was learned from labels"


@dataclass(frozen=True)
class TaskLoss:
    """Cross-entropy of `logits` and batch["labels"]: one label a sample, or a probability of each class, or for [batch,
    tokens] of labels the next token's, where -100 counts for nothing.

    Attributes:
        smoothing: share of each label that is spread over all classes.
        problem: "multi_label_classification": labels [samples, classes] from 0 to 1, of each class by itself, and the
            mean of their cross-entropies; "regression": measured values, and the mean squared difference.
    """

    smoothing: float = 0.0
    problem: str | None = None

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.problem is not None:
            return _loss_of_each(logits, batch["labels"], self.problem)
        return _cross_entropy(logits, batch["labels"], self.smoothing)

    def counts(self, labels: Any) -> bool:
        """Whether any of these counts."""
        if self.problem:
            return True  # of measured values and of several classes -100 is one like any other
        labels = torch.as_tensor(labels)
        of_tokens = labels.dim() == 2 and not labels.is_floating_point()
        return bool(((labels[:, 1:] if of_tokens else labels) != IGNORED).any())


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    given = labels
    if labels.dim() == 2 and logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    real = labels.is_floating_point() or labels.is_complex()
    classes = logits.shape[1] if logits.dim() > 1 else 1
    fitting = logits.shape if real else logits.shape[:1] + logits.shape[2:]
    if labels.shape != fitting or (real and classes == 1):
        raise JointoptError(
            f"train: labels are {dtype_name(given.dtype)} {list(given.shape)}, logits {list(logits.shape)}; allowed: "
            "classes, whole numbers, or a probability of each; for what is no classification Recipe(loss=...), a "
            "function of logits and batch"
        )
    if real and not are_probabilities(labels):
        raise JointoptError(
            f"train: labels are {dtype_name(given.dtype)} {list(given.shape)} of which a sample's do not add up to 1; "
            "allowed: classes, or a probability of each; for several classes at once or measured values "
            f"config.problem_type {MULTI_LABEL!r} or {REGRESSION!r}, or Recipe(loss=...), a function of logits and "
            "batch"
        )
    if not real:
        labels = labels.long()
        counted = labels != IGNORED
        if wrong := labels[counted & ((labels < 0) | (labels >= classes))].tolist():
            raise JointoptError(
                f"train: labels: found {wrong[0]}; allowed: 0 to {classes - 1}, and {IGNORED} for what does not count"
            )
        if not counted.any():
            return logits.float().sum() * 0.0  # a mean over nothing is no number
    return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def _loss_of_each(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    """Where each output has a label of its own."""
    single = problem == REGRESSION and logits.shape[-1] == 1 and labels.numel() == logits.numel()
    if labels.shape != logits.shape and not single:
        raise JointoptError(
            f"train: labels are {dtype_name(labels.dtype)} {list(labels.shape)}, logits {list(logits.shape)}, of a "
            f"model whose problem_type is {problem!r}; allowed: one label for each of the logits"
        )
    labels = labels.float().view_as(logits)
    if problem == REGRESSION:
        return nn.functional.mse_loss(logits.float(), labels)
    if wrong := labels[(labels < 0) | (labels > 1)].tolist():
        raise JointoptError(f"train: labels: found {wrong[0]:g}; allowed: 0 to 1, for each class by itself")
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)


@dataclass(frozen=True)
class Recipe:
    """How a super-network is trained.

    Attributes:
        sampling: "sandwich", "random", "attentive", "progressive", or a strategy with its options.
        distillation: what the sampled sub-networks learn from the largest; None has each learn the task itself.
        precision_from: share of the steps after which sampled sub-networks compute in their number formats (the
            largest never does); None for never. Scales are those of the weights as they are, as the search has them.
        learned_ranges: whether ranges of quantized weights and static inputs are trained with these (LSQ, arXiv
            1902.08153): a factor for each layer and scheme. In one's own loop call `supernet.learn_ranges()` before the
            optimizer is made.
        loss: (logits, batch) -> scalar, of the task; the usual one follows the model's `config.problem_type`.
        seed: of the sub-networks sampled.
    """

    sampling: str | Sampling = "sandwich"
    distillation: Distillation | None = field(default_factory=Distillation)
    precision_from: float | None = None
    learned_ranges: bool = False
    loss: Loss = TaskLoss()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling", strategy_of(self.sampling))
        if not isinstance(self.distillation, Distillation | None):
            raise JointoptError(f"distillation: found {self.distillation!r}; allowed: a Distillation, or None")
        if self.precision_from is not None:
            check_number("precision_from", self.precision_from, 1)
        if not callable(self.loss):
            raise JointoptError(f"loss: found {self.loss!r}; allowed: a function of logits and batch")
        check_whole("recipe: seed", self.seed)
        if self.learned_ranges and self.precision_from is None:
            raise JointoptError("learned_ranges: found no precision_from; allowed: with number formats in training")

    def check(self, supernet: Supernet) -> None:
        """Raises JointoptError for what this super-network cannot be trained with, before any step."""
        check_supernet("train", supernet)
        if not (supernet.calibrated or supernet.trained):
            raise JointoptError(
                "train: call supernet.calibrate(batches) first; training follows the order of importance"
            )
        kind = getattr(supernet.model, "loss_type", None)
        if kind in ("ForTokenClassification", "ForMaskedLM") and self.is_usual:
            raise JointoptError(
                f"loss: found a {type(supernet.model).__name__}, whose labels are each token's own, not the next's; "
                "allowed: Recipe(loss=...), a function of logits and batch"
            )
        for path, module in supernet.model.named_modules():
            wrapping = getattr(module, "_gradient_checkpointing_func", None)  # transformers' name
            if getattr(wrapping, "keywords", {}).get("use_reentrant"):
                raise JointoptError(
                    f"{path}: its activations are checkpointed with use_reentrant=True, which gradients of some "
                    "parameters alone cannot go back through; allowed: use_reentrant=False"
                )
        if self.distillation is not None:
            self.distillation.check(supernet.family, supernet.space, supernet.model)
        quantized = any(wanted.weights is not None for wanted in supernet.schemes.values())
        if self.precision_from is not None and not quantized:
            raise JointoptError("precision_from: found no number format in the space; allowed: leave it out")
        for (path, _), wanted in supernet.schemes.items() if self.precision_from is not None else ():
            supernet.constants(path, wanted)
        self.strategy.genomes(supernet.space, 0.0, self.seed)

    @property
    def strategy(self) -> Sampling:
        """`sampling`, which may be given by name."""
        assert not isinstance(self.sampling, str)
        return self.sampling

    @property
    def is_usual(self) -> bool:
        """Whether the loss is the usual one, and not one of the user's own."""
        return isinstance(self.loss, TaskLoss)

    def counts(self, labels: Any) -> bool:
        """Whether the loss counts any of these; of a loss of one's own nobody can say, and so it does."""
        return not isinstance(self.loss, TaskLoss) or self.loss.counts(labels)

    def suited(self, model: nn.Module) -> Recipe:
        """With the loss that the model's `config.problem_type` asks for, in place of the usual one."""
        problem = problem_of(model)
        if problem is None or not isinstance(self.loss, TaskLoss):
            return self
        return replace(self, loss=replace(self.loss, problem=problem))


def checked(recipe: Recipe | None) -> Recipe | None:
    """Raises JointoptError for what is no recipe."""
    if not isinstance(recipe, Recipe | None):
        raise JointoptError(f"recipe: found {recipe!r}; allowed: a Recipe, such as Recipe(sampling='random')")
    return recipe
