"""The sandwich rule: each step trains the largest, the smallest and some random sub-networks of the super-network.

The largest learns the task, the others are distilled from it (Yu and Huang, arXiv 1903.05134; used for pretrained
transformers by InstaTune, arXiv 2308.15609).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from jointopt.batch_norm import on_device
from jointopt.evaluation import Batch, logits_of
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.supernet import Supernet

Loss = Callable[[Tensor, Batch], Tensor]


def task_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of `logits` and batch["labels"]: one label a sample, or for [batch, tokens] of labels the next
    token's, where -100 counts for nothing."""
    labels = batch["labels"]
    if labels.dim() == 2 and logits.dim() == 3:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return nn.functional.cross_entropy(logits.float(), labels)


def train_sandwich(
    supernet: Supernet,
    batches: Sequence[Batch] | Callable[[int], Iterable[Batch]],
    steps: int,
    *,
    learning_rate: float = 5e-5,
    weight_decay: float = 0.01,
    random_subnetworks: int = 2,
    loss: Loss = task_loss,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Trains a calibrated super-network in place. Calibrate it again afterwards: its order then stays.

    Args:
        batches: a list of dicts of model inputs and "labels", gone through in a new random order each epoch; or a
            function from the epoch's number to an iterable of them.
        steps: number of optimizer steps (AdamW; 10% linear warm-up, then a cosine to zero).
        learning_rate, weight_decay: AdamW's.
        random_subnetworks: how many beside the largest and the smallest in each step.
        loss: (logits, batch) -> scalar, for the largest sub-network.
        seed: of the order of batches, the sub-networks drawn and dropout.

    Returns:
        The largest sub-network's loss at each step.

    Raises:
        JointoptError: the super-network is not calibrated, no batch came, labels are missing, or a loss is not finite.
    """
    if not supernet.calibrated:
        raise JointoptError("train: call supernet.calibrate(batches) first; training follows the order of importance")
    model = supernet.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    warmup = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, warmup, steps))
    random = np.random.default_rng(seed)
    history: list[float] = []
    with torch.random.fork_rng(devices=[model_device] if (model_device := _cuda(supernet)) is not None else []):
        torch.manual_seed(seed)
        numbered = zip(range(steps), _endless(batches, random), strict=False)
        for _, batch in track(numbered, "super-network training", total=steps, disable=not progress):
            optimizer.zero_grad(set_to_none=True)
            history.append(_step(supernet, batch, random, random_subnetworks, loss))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    supernet.finish_training()
    return history


def _step(supernet: Supernet, batch: Batch, random: np.random.Generator, count: int, loss: Loss) -> float:
    """Gradients of one sandwich; returns the largest sub-network's loss."""
    batch = on_device(batch, supernet.device)
    if "labels" not in batch:
        raise JointoptError(f"train: a batch has no 'labels'; found {', '.join(batch)}")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    space = supernet.space
    largest = logits_of(supernet.training_view(space.largest), inputs)
    value = loss(largest, batch)
    if not torch.isfinite(value):
        raise JointoptError(f"train: the loss is {value.item()}; a smaller learning_rate may help")
    value.backward()
    target = largest.detach()
    seeds = [int(random.integers(2**31)) for _ in range(count)]
    for genome in [space.smallest, *(space.sample(1, seed)[0] for seed in seeds)]:
        small = logits_of(supernet.training_view(genome), inputs)
        distillation(small, target, batch).backward()
    return value.item()


def distillation(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """KL divergence of the student's from the teacher's distribution, averaged over samples or unpadded tokens."""
    student, teacher = student.float(), teacher.float()
    divergence = nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    )
    divergence = divergence.sum(-1)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == divergence.shape:
        return (divergence * mask).sum() / mask.sum()
    return divergence.mean()


def _schedule(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _endless(batches: Any, random: np.random.Generator) -> Iterable[Batch]:
    epoch = 0
    while True:
        epoch_batches = batches(epoch) if callable(batches) else [batches[i] for i in random.permutation(len(batches))]
        empty = True
        for batch in epoch_batches:
            empty = False
            yield batch
        if empty:
            raise JointoptError("train: found no batch")
        epoch += 1


def _cuda(supernet: Supernet) -> torch.device | None:
    return supernet.device if supernet.device.type == "cuda" else None
