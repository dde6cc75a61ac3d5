"""Accuracy, loss, perplexity and KL divergence, over the same batches for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jointopt.evaluation import Batch, Quality, logits_of

Counted = tuple[Tensor, Tensor]
"""(logits [n, classes], labels [n]) that count."""


def classification_quality(batches: Sequence[Batch], original: nn.Module | None = None) -> Quality:
    """accuracy, loss (cross-entropy) and, where `original` is given, kl of its distribution to the model's."""
    return _quality(batches, original, lambda logits, labels: (logits, labels), _classification)


def language_quality(batches: Sequence[Batch], original: nn.Module | None = None) -> Quality:
    """loss (cross-entropy of the next token), perplexity and, where `original` is given, kl a token."""
    return _quality(batches, original, _next_tokens, _language)


def _next_tokens(logits: Tensor, labels: Tensor) -> Counted:
    counted = labels[:, 1:] != -100
    return logits[:, :-1][counted], labels[:, 1:][counted]


def _classification(loss: float, right: float) -> dict[str, float]:
    return {"accuracy": right, "loss": loss}


def _language(loss: float, right: float) -> dict[str, float]:
    return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


def _quality(
    batches: Sequence[Batch],
    original: nn.Module | None,
    counted: Callable[[Tensor, Tensor], Counted],
    named: Callable[[float, float], dict[str, float]],
) -> Quality:
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    references: list[Tensor] = []
    if original is not None:
        with torch.no_grad():
            for batch, given in zip(batches, inputs, strict=True):
                references.append(counted(logits_of(original, given), batch["labels"])[0].clone())

    def quality(model: nn.Module) -> dict[str, float]:
        loss = right = divergence = 0.0
        count = 0
        for at, (batch, given) in enumerate(zip(batches, inputs, strict=True)):
            logits, labels = counted(logits_of(model, given), batch["labels"])
            logits = logits.float()
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(-1) == labels).sum())
            if references:
                target = references[at].float().log_softmax(-1)
                divergence += float(nn.functional.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True))
            count += len(labels)
        found = named(loss / count, right / count)
        return {**found, "kl": divergence / count} if references else found

    return quality
