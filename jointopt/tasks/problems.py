"""What a model's outputs are: one class of several, several classes at once, measured values, or next tokens; how
labels of the kind are read, and how outputs are scored by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jointopt.arithmetic import full_float32
from jointopt.batches import Batch, without_labels
from jointopt.evaluation.evaluation import Metrics, Quality
from jointopt.outputs import IGNORED, MULTI_LABEL, REGRESSION, logits_of, row_groups
from jointopt.tasks.labels import LabelReader, class_labels, multi_labels, value_labels
from jointopt.tasks.metrics import (
    choice_metrics,
    choice_scores,
    class_metrics,
    class_scores,
    value_metrics,
    value_scores,
)
from quant.errors import JointoptError


@dataclass(frozen=True)
class Counted:
    """Of a batch's logits, flattened to [rows, outputs], those that count.

    Attributes:
        rows: their places, [n].
        wanted: what they should say, [n] or [n, outputs].
        owners: the samples that they belong to, [n], on the CPU.
    """

    rows: Tensor
    wanted: Tensor
    owners: Tensor


def of_classes(labels: Tensor) -> Counted:
    """Classes [samples] or [samples, tokens], where IGNORED does not count."""
    samples = torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    owners, wanted = samples.expand_as(labels).flatten(), labels.flatten()
    rows = (wanted != IGNORED).nonzero()[:, 0]
    return Counted(rows, wanted[rows], owners[rows].cpu())


def of_next_tokens(labels: Tensor) -> Counted:
    """Tokens [samples, tokens]: for each the one after it."""
    return of_classes(nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED))


def of_samples(labels: Tensor) -> Counted:
    """Labels of each sample's outputs, [samples, outputs] or, of one output, [samples]."""
    rows = torch.arange(len(labels))
    return Counted(rows.to(labels.device), labels, rows)


@dataclass(frozen=True)
class Problem:
    """What a model's outputs are.

    Attributes:
        metrics: what they are scored by; the first is the default objective.
        counted: labels of a batch -> the rows of logits that count.
        scores: (logits [rows, outputs], what they should say, the original's logits or None), all on one device ->
            [rows, scores]; see `jointopt.tasks.metrics`.
        summary: (scores of all rows in float64, the samples that they belong to, how many samples) -> metrics.
        labels: reads the labels of a table's rows; None where running text is its own.
        check: (all labels that count, key) raises JointoptError where there is nothing that the metrics could tell.
    """

    metrics: tuple[str, ...]
    counted: Callable[[Tensor], Counted]
    scores: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    summary: Callable[[Tensor, Tensor, int], Metrics]
    labels: LabelReader | None = None
    check: Callable[[Tensor, str], None] | None = None

    def quality(self, batches: Sequence[Batch], original: nn.Module | None = None, key: str = "labels") -> Quality:
        """model -> {metric: value}, of all labels that count, with the values' standard errors.

        Args:
            batches: inputs by name, and "labels".
            original: what "kl" (divergence of the model's distribution, in nats) is measured from; run once, its logits
                are kept. None leaves it out.
            key: what labels are called in errors: the config's key.

        Raises:
            JointoptError: labels of which the metrics could tell nothing.
        """
        inputs = [without_labels(batch) for batch in batches]
        counted = [self.counted(batch["labels"]) for batch in batches]
        if self.check is not None:
            self.check(torch.cat([each.wanted for each in counted]), key)
        references: list[Tensor] | None = None
        if original is not None and "kl" in self.metrics:
            with torch.no_grad(), full_float32():
                references = [
                    logits_of(original, given).flatten(0, -2)[each.rows]
                    for each, given in zip(counted, inputs, strict=True)
                ]
        wanted = [name for name in self.metrics if name != "kl" or references is not None]

        def quality(model: nn.Module) -> Metrics:
            scores, owners, seen = [], [], 0
            for at, (batch, each, given) in enumerate(zip(batches, counted, inputs, strict=True)):
                logits = logits_of(model, given).flatten(0, -2)
                scores.append(_scores(logits, each, None if references is None else references[at], self))
                owners.append(each.owners + seen)
                seen += len(batch["labels"])
            # Only here does the device have to be waited for.
            found = self.summary(torch.cat(scores).cpu().double(), torch.cat(owners), seen)
            return Metrics({name: found[name] for name in wanted}, {n: found.errors[n] for n in wanted if seen > 1})

        return quality


def _scores(logits: Tensor, counted: Counted, reference: Tensor | None, problem: Problem) -> Tensor:
    """The problem's scores of each row that counts, float32."""
    # A model that runs in another process answers on the CPU.
    device = logits.device
    places, labels = counted.rows.to(device), counted.wanted.to(device)
    found = []
    for group in list(row_groups(len(labels), logits.shape[1], device)) or [slice(0)]:
        target = None if reference is None else reference[group].to(device).float()
        found.append(problem.scores(logits[places[group]].float(), labels[group], target))
    return torch.cat(found)


def _check_some(labels: Tensor, key: str) -> None:
    if not labels.any():
        raise JointoptError(f"{key}: found no class in any of {len(labels)} rows; allowed: one or more, for f1")


def _check_different(labels: Tensor, key: str) -> None:
    for at, values in enumerate(labels.view(len(labels), -1).unbind(1)):
        if (values == values[0]).all():
            of = "" if labels.dim() == 1 else f" for output {at}"
            raise JointoptError(
                f"{key}: found {values[0]:g}{of} in all of {len(labels)} rows; allowed: two values or more, for pearson"
            )


ONE_CLASS = Problem(("accuracy", "loss", "kl"), of_classes, class_scores, class_metrics, class_labels)
NEXT_TOKEN = Problem(("perplexity", "loss", "accuracy", "kl"), of_next_tokens, class_scores, class_metrics)
SEVERAL_CLASSES = Problem(
    ("f1", "accuracy", "loss", "kl"), of_samples, choice_scores, choice_metrics, multi_labels, _check_some
)
VALUES = Problem(("pearson", "mse"), of_samples, value_scores, value_metrics, value_labels, _check_different)

CLASSIFICATION: dict[str | None, Problem] = {None: ONE_CLASS, MULTI_LABEL: SEVERAL_CLASSES, REGRESSION: VALUES}
"""What a classifier's outputs can be, by what `problem_of` says of it."""
