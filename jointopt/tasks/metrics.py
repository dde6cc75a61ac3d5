"""Accuracy, loss, perplexity and KL divergence, over the same batches for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jointopt.evaluation import Batch, Quality, logits_of

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
    """model -> {metric: value}, averaged over all labels that count.

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

    def quality(model: nn.Module) -> dict[str, float]:
        sums, count = [], 0
        for at, (batch, given) in enumerate(zip(batches, inputs, strict=True)):
            # A model that runs in another process answers on the CPU.
            logits = logits_of(model, given)
            logits, labels = counted(logits, batch["labels"].to(logits.device))
            sums.append(_sums(logits, labels, None if references is None else references[at]))
            count += len(labels)
        # Only here does the device have to be waited for.
        loss, right, divergence = (torch.stack(sums).cpu().double().sum(0) / count).tolist()
        # The class of largest logit means nothing where logits are not numbers.
        accuracy = right if math.isfinite(loss) else math.nan
        perplexity = math.exp(loss) if loss < 700 else math.inf
        found = {"accuracy": accuracy, "loss": loss, "perplexity": perplexity, "kl": divergence}
        return {name: found[name] for name in wanted}

    return quality


def _sums(logits: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    """Sums over the rows of cross-entropy, right answers, and divergence from the reference, float32 [3]."""
    total = torch.zeros(3, device=logits.device)
    for at in range(0, len(labels), ROWS):
        rows, wanted = logits[at : at + ROWS].float(), labels[at : at + ROWS]
        scores = rows.log_softmax(-1)
        total[0] += nn.functional.nll_loss(scores, wanted, reduction="sum")
        total[1] += (rows.argmax(-1) == wanted).sum()
        if reference is not None:
            target = reference[at : at + ROWS].to(rows.device).float().log_softmax(-1)
            total[2] += nn.functional.kl_div(scores, target, reduction="sum", log_target=True)
    return total
