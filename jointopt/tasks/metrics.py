"""Accuracy, loss, perplexity and KL divergence, over the same batches for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jointopt.evaluation import IGNORED, Batch, Metrics, Quality, logits_of, row_groups

Targets = Callable[[Tensor], Tensor]
"""Labels of a batch -> for each row of logits the class that it should have, or IGNORED."""


def every(labels: Tensor) -> Tensor:
    """One label a sample."""
    return labels


def next_tokens(labels: Tensor) -> Tensor:
    """For each token the one after it."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class _Counted:
    """Of a batch's logits, flattened to [rows, classes], those that count.

    Attributes:
        rows, wanted: their places and classes, [n].
        owners: the samples that they belong to, [n], on the CPU.
    """

    def __init__(self, labels: Tensor, targets: Targets):
        wanted = targets(labels)
        samples = torch.arange(len(wanted), device=wanted.device).view(-1, *[1] * (wanted.dim() - 1))
        owners, wanted = samples.expand_as(wanted).flatten(), wanted.flatten()
        self.rows = (wanted != IGNORED).nonzero()[:, 0]
        self.wanted = wanted[self.rows]
        self.owners = owners[self.rows].cpu()


def quality_function(
    batches: Sequence[Batch],
    targets: Targets,
    metrics: Sequence[str],
    original: nn.Module | None = None,
) -> Quality:
    """model -> {metric: value}, averaged over all labels that count, with the values' standard errors.

    The function takes `samples`: it then stops behind the batch in which so many are reached.

    Args:
        batches: inputs by name, and "labels".
        targets: what of the labels each row of logits should say.
        metrics: of "accuracy", "loss" (cross-entropy, in nats), "perplexity" (its exponential) and "kl" (divergence of
            the model's distribution from the original's, in nats), which is left out where `original` is None.
        original: what "kl" is measured from; run once, its logits are kept.
    """
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    counted = [_Counted(batch["labels"], targets) for batch in batches]
    references: list[Tensor] | None = None
    if original is not None:
        with torch.no_grad():
            references = [
                logits_of(original, given).flatten(0, -2)[each.rows]
                for each, given in zip(counted, inputs, strict=True)
            ]
    wanted = [name for name in metrics if name != "kl" or references is not None]

    def quality(model: nn.Module, samples: int | None = None) -> Metrics:
        scores, owners, seen = [], [], 0
        for at, (batch, each, given) in enumerate(zip(batches, counted, inputs, strict=True)):
            logits = logits_of(model, given).flatten(0, -2)
            scores.append(_scores(logits, each, None if references is None else references[at]))
            owners.append(each.owners + seen)
            seen += len(batch["labels"])
            if samples is not None and seen >= samples:
                break
        # Only here does the device have to be waited for.
        means, errors = _means(torch.cat(scores).cpu().double(), torch.cat(owners), seen)
        loss, right, divergence = means
        # The class of largest logit means nothing where logits are not numbers.
        accuracy = right if math.isfinite(loss) else math.nan
        perplexity = math.exp(loss) if loss < 700 else math.inf
        found = {"accuracy": accuracy, "loss": loss, "perplexity": perplexity, "kl": divergence}
        spread = {"accuracy": errors[1], "loss": errors[0], "perplexity": perplexity * errors[0], "kl": errors[2]}
        return Metrics({name: found[name] for name in wanted}, {name: spread[name] for name in wanted if seen > 1})

    return quality


def _scores(logits: Tensor, counted: _Counted, reference: Tensor | None) -> Tensor:
    """Of each row that counts cross-entropy, whether it is right, and divergence from the reference, float32 [n, 3]."""
    # A model that runs in another process answers on the CPU.
    device = logits.device
    places, labels = counted.rows.to(device), counted.wanted.to(device)
    found = torch.zeros(len(labels), 3, device=device)
    for group in row_groups(len(labels), logits.shape[1], device):
        rows, wanted, part = logits[places[group]].float(), labels[group], found[group]
        scores = rows.log_softmax(-1)
        part[:, 0] = nn.functional.nll_loss(scores, wanted, reduction="none")
        part[:, 1] = rows.argmax(-1) == wanted
        if reference is not None:
            target = reference[group].to(device).float().log_softmax(-1)
            part[:, 2] = nn.functional.kl_div(scores, target, reduction="none", log_target=True).sum(-1)
    return found


def _means(scores: Tensor, owners: Tensor, samples: int) -> tuple[list[float], list[float]]:
    """Means over all rows, and their standard errors, where rows of one sample hang together: those of a ratio of two
    sums over samples (Cochran, Sampling Techniques, 1977, eq. 6.13)."""
    sums = torch.zeros(samples, scores.shape[1], dtype=scores.dtype).index_add_(0, owners, scores)
    counts = torch.bincount(owners, minlength=samples).to(scores.dtype)[:, None]
    means = sums.sum(0) / counts.sum()
    spread = (sums - means * counts).square().sum(0) * samples / max(samples - 1, 1)
    return means.tolist(), (spread.sqrt() / counts.sum()).tolist()
