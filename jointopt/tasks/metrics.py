"""Accuracy, loss, perplexity and KL divergence, over the same batches for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jointopt.evaluation import Batch, Metrics, Quality, logits_of

Counted = tuple[Tensor, Tensor]
"""(logits [n, classes], labels [n]) that count."""

ROWS = 1024
"""Distributions that are turned into float32 at once: those of a vocabulary take 0.2 MB each."""


def every(logits: Tensor, labels: Tensor) -> Counted:
    """One label a sample."""
    return logits, labels


def next_tokens(logits: Tensor, labels: Tensor) -> Counted:
    """Each token's logits with the token after it, where that is not masked (-100)."""
    counted = labels[:, 1:] != -100
    if counted.all():
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return logits[:, :-1][counted], labels[:, 1:][counted]


def quality_function(
    batches: Sequence[Batch],
    counted: Callable[[Tensor, Tensor], Counted],
    metrics: Sequence[str],
    original: nn.Module | None = None,
) -> Quality:
    """model -> {metric: value}, averaged over all labels that count, with the values' standard errors.

    The function takes `samples`: it then stops behind the batch in which so many are reached.

    Args:
        batches: inputs by name, and "labels".
        counted: (logits, labels) -> those that count.
        metrics: of "accuracy", "loss" (cross-entropy, in nats), "perplexity" (its exponential) and "kl" (divergence of
            the model's distribution from the original's, in nats), which is left out where `original` is None.
        original: what "kl" is measured from; run once, its logits are kept.
    """
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    references: list[Tensor] | None = None
    if original is not None:
        with torch.no_grad():
            references = [
                counted(logits_of(original, given), batch["labels"])[0].clone()
                for batch, given in zip(batches, inputs, strict=True)
            ]
    wanted = [name for name in metrics if name != "kl" or references is not None]
    owners, total = [], 0
    for batch in batches:
        owners.append(_owners(counted, batch["labels"]).cpu() + total)
        total += len(batch["labels"])

    def quality(model: nn.Module, samples: int | None = None) -> Metrics:
        scores, seen = [], 0
        for at, (batch, given) in enumerate(zip(batches, inputs, strict=True)):
            # A model that runs in another process answers on the CPU.
            logits = logits_of(model, given)
            logits, labels = counted(logits, batch["labels"].to(logits.device))
            scores.append(_scores(logits, labels, None if references is None else references[at]))
            seen += len(batch["labels"])
            if samples is not None and seen >= samples:
                break
        # Only here does the device have to be waited for.
        means, errors = _means(torch.cat(scores).cpu().double(), torch.cat(owners[: len(scores)]), seen)
        loss, right, divergence = means
        # The class of largest logit means nothing where logits are not numbers.
        accuracy = right if math.isfinite(loss) else math.nan
        perplexity = math.exp(loss) if loss < 700 else math.inf
        found = {"accuracy": accuracy, "loss": loss, "perplexity": perplexity, "kl": divergence}
        spread = {"accuracy": errors[1], "loss": errors[0], "perplexity": perplexity * errors[0], "kl": errors[2]}
        return Metrics({name: found[name] for name in wanted}, {name: spread[name] for name in wanted if seen > 1})

    return quality


def _scores(logits: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    """Of each row cross-entropy, whether it is right, and divergence from the reference, float32 [rows, 3]."""
    found = torch.zeros(len(labels), 3, device=logits.device)
    for at in range(0, len(labels), ROWS):
        rows, wanted = logits[at : at + ROWS].float(), labels[at : at + ROWS]
        scores, part = rows.log_softmax(-1), found[at : at + ROWS]
        part[:, 0] = nn.functional.nll_loss(scores, wanted, reduction="none")
        part[:, 1] = rows.argmax(-1) == wanted
        if reference is not None:
            target = reference[at : at + ROWS].to(rows.device).float().log_softmax(-1)
            part[:, 2] = nn.functional.kl_div(scores, target, reduction="none", log_target=True).sum(-1)
    return found


def _owners(counted: Callable[[Tensor, Tensor], Counted], labels: Tensor) -> Tensor:
    """The sample that each label which counts belongs to, [rows]."""
    numbers = torch.arange(len(labels), device=labels.device).view(-1, *[1] * labels.dim())
    return counted(numbers.expand(*labels.shape, 1), labels)[0][:, 0]


def _means(scores: Tensor, owners: Tensor, samples: int) -> tuple[list[float], list[float]]:
    """Means over all rows, and their standard errors, where rows of one sample hang together: those of a ratio of two
    sums over samples (Cochran, Sampling Techniques, 1977, eq. 6.13)."""
    sums = torch.zeros(samples, scores.shape[1], dtype=scores.dtype).index_add_(0, owners, scores)
    counts = torch.bincount(owners, minlength=samples).to(scores.dtype)[:, None]
    means = sums.sum(0) / counts.sum()
    spread = (sums - means * counts).square().sum(0) * samples / max(samples - 1, 1)
    return means.tolist(), (spread.sqrt() / counts.sum()).tolist()
