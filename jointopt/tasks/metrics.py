"""How rows of logits are scored by what they should say, and what the scores of all rows make: numbers alone.

Each kind of output has two functions: one gives some scores of each row, on the device; the other makes metrics with
their standard errors of all rows' scores, in float64 on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jointopt.evaluation.evaluation import Metrics


def class_scores(logits: Tensor, classes: Tensor, reference: Tensor | None) -> Tensor:
    """Of each row of logits [rows, classes] cross-entropy, whether the class is right, and divergence from the
    reference (0 where there is none): [rows, 3]."""
    scores = logits.log_softmax(-1)
    loss = nn.functional.nll_loss(scores, classes, reduction="none")
    divergence = torch.zeros_like(loss)
    if reference is not None:
        target = reference.log_softmax(-1)
        divergence = nn.functional.kl_div(scores, target, reduction="none", log_target=True).sum(-1)
        divergence = divergence.clamp_min(0)  # as it is but for the last bits of its terms
    return torch.stack([loss, (logits.argmax(-1) == classes).float(), divergence], 1)


def class_metrics(scores: Tensor, owners: Tensor, samples: int) -> Metrics:
    """Accuracy, loss, its exponential, and KL divergence, averaged over all rows.

    Args:
        scores: of `class_scores`.
        owners: the samples that the rows belong to, [rows].
        samples: how many there are.
    """
    sums = torch.zeros(samples, scores.shape[1], dtype=scores.dtype).index_add_(0, owners, scores)
    counts = torch.bincount(owners, minlength=samples).to(scores.dtype)[:, None]
    (loss, right, divergence), errors = _ratios(sums, counts)
    # The class of largest logit means nothing where logits are not numbers.
    accuracy = right if math.isfinite(loss) else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    found = {"accuracy": accuracy, "loss": loss, "perplexity": perplexity, "kl": divergence}
    spread = {"accuracy": errors[1], "loss": errors[0], "perplexity": perplexity * errors[0], "kl": errors[2]}
    return Metrics(found, spread)


def choice_scores(logits: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    """Of each row of logits [rows, classes], where each class is right or is not: binary cross-entropy, averaged over
    the classes; whether all are told rightly; the divergence from the reference, summed over them; twice the classes
    that are told and right; those told and those right together: [rows, 5]."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    told, right = logits > 0, labels > 0
    divergence = torch.zeros_like(loss)
    if reference is not None:
        for sign in (1, -1):  # of being right, and of not being it
            target, found = (nn.functional.logsigmoid(sign * each) for each in (reference, logits))
            divergence = divergence + nn.functional.kl_div(found, target, reduction="none", log_target=True).sum(-1)
        divergence = divergence.clamp_min(0)
    both, either = 2 * (told & right).sum(-1), told.sum(-1) + right.sum(-1)
    return torch.stack([loss, (told == right).all(-1).float(), divergence, both.float(), either.float()], 1)


def choice_metrics(scores: Tensor, owners: Tensor, samples: int) -> Metrics:
    """F1 of all labels counted together (micro; one of them or more is right), accuracy (the share of samples all of
    whose labels are right), loss and KL divergence; of `choice_scores`, a row for each sample."""
    weights = torch.cat([torch.ones_like(scores[:, :3]), scores[:, 4:]], 1)
    (loss, right, divergence, f1), errors = _ratios(scores[:, :4], weights)
    if not math.isfinite(loss):  # no logit that is not a number is above 0
        f1 = right = math.nan
    found = {"f1": f1, "accuracy": right, "loss": loss, "kl": divergence}
    return Metrics(found, dict(zip(("loss", "accuracy", "kl", "f1"), errors, strict=True)))


def value_scores(logits: Tensor, values: Tensor, reference: Tensor | None) -> Tensor:
    """Each row of logits [rows, outputs] beside the values that it should have: [rows, 2 * outputs]."""
    return torch.cat([logits, values.view_as(logits)], 1)


def value_metrics(scores: Tensor, owners: Tensor, samples: int) -> Metrics:
    """Pearson's correlation, averaged over outputs, 0 of one that is always the same; and mean squared error; of
    `value_scores`, a row for each sample.

    The correlation's error is by its influence function (Devlin, Gnanadesikan and Kettenring, Biometrika 62, 1975).
    """
    found, wanted = scores.chunk(2, dim=1)
    x, y = _standardized(found), _standardized(wanted)
    correlations = (x * y).mean(0)
    influence = (x * y - correlations * (x.square() + y.square()) / 2).mean(1)
    each = torch.stack([(found - wanted).square().mean(1), influence], 1)
    (mse, _), (mse_error, pearson_error) = _ratios(each, torch.ones_like(each))
    pearson = float(correlations.mean()) if math.isfinite(mse) else math.nan
    return Metrics({"pearson": pearson, "mse": mse}, {"pearson": pearson_error, "mse": mse_error})


def _standardized(values: Tensor) -> Tensor:
    """Each column with a mean of 0 and a mean square of 1; all 0 of one whose values are all the same."""
    centered = values - values.mean(0)
    constant = values.amax(0) == values.amin(0)
    return torch.where(constant, 0.0, centered / centered.square().mean(0).sqrt())


def _ratios(sums: Tensor, counts: Tensor) -> tuple[list[float], list[float]]:
    """Sums over all samples by counts over all samples, [samples, ratios], and their standard errors, where what is of
    one sample hangs together (Cochran, Sampling Techniques, 1977, eq. 6.13)."""
    samples = len(sums)
    total = counts.sum(0)
    ratios = sums.sum(0) / total
    spread = (sums - ratios * counts).square().sum(0) * samples / max(samples - 1, 1)
    return ratios.tolist(), (spread.sqrt() / total).tolist()
