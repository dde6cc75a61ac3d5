"""Batches of a model's inputs: how many samples are in them and how long these are, parts of them, where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quant.errors import JointoptError

Batch = Mapping[str, Any]
"""What a model's forward takes, by name; "labels" beside it are for losses and metrics."""


def check_batch(name: str, batch: Any) -> None:
    """Raises JointoptError for what is no dict of a model's inputs."""
    if not isinstance(batch, Mapping):
        raise JointoptError(
            f"{name}: found a batch of type {type(batch).__name__}; allowed: dicts of the model's inputs"
        )
    if not batch:
        raise JointoptError(f"{name}: found an empty batch; allowed: dicts of the model's inputs")


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens a text may have at most, as the model has positions; None where it does not say."""
    return learned_positions(model) or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def learned_positions(model: nn.Module) -> int | None:
    """How many positions the model has a vector for, beyond which it cannot run; None where it computes them (RoPE)."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts its positions from behind the padding's.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def sample_count(batch: Mapping[str, Any]) -> int:
    """Length of the batch's first tensor, 0 where it has none."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors, and arrays as such, on the device."""
    return {k: torch.as_tensor(v).to(device) if isinstance(v, Tensor | np.ndarray) else v for k, v in batch.items()}


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's forward takes of a batch."""
    return {name: value for name, value in batch.items() if name != "labels"}


def first_samples(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A copy of the batch, cut to its first `count` samples where it holds more."""
    return {k: v[:count].clone() if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}


def none_alone(batches: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Merges a batch of one sample with a neighbour of the same shape, because BatchNorm over a single pixel of one
    sample has no variance."""
    found: list[Mapping[str, Any]] = []
    for batch in batches:
        if found and sample_count(found[-1]) == 1 and _alike(found[-1], batch):
            found[-1] = _joined(found[-1], batch)
        else:
            found.append(batch)
    if len(found) > 1 and sample_count(found[-1]) == 1 and _alike(*found[-2:]):
        found[-2:] = [_joined(*found[-2:])]
    return found


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    shapes = [{k: v.shape[1:] for k, v in each.items() if isinstance(v, Tensor)} for each in (first, second)]
    return shapes[0] == shapes[1]


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.cat([v, second[k]]) if isinstance(v, Tensor) and v.dim() else v for k, v in first.items()}


def lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each sample, without padding; none where the batch does not say."""
    mask, shape = batch.get("attention_mask"), _tokens(batch)
    if shape is None:
        return []
    return mask.sum(1).tolist() if isinstance(mask, Tensor) else [shape[1]] * shape[0]


def of_average_length(batch: Mapping[str, Any], found: Sequence[int]) -> dict[str, Any]:
    """The batch; where lengths were `found` and it is of tokens, its texts cut or repeated to their average."""
    shape = _tokens(batch)
    if not found or shape is None:
        return dict(batch)
    length, (count, tokens) = max(1, round(sum(found) / len(found))), shape

    def sized(value: Any) -> Any:
        # What all samples have in common comes once, as positions may.
        if not isinstance(value, Tensor) or value.shape[:2] not in ((count, tokens), (1, tokens)):
            return value
        return value.repeat(1, -(-length // tokens), *(1,) * (value.dim() - 2))[:, :length]

    return {name: sized(value) for name, value in batch.items()}


def _tokens(batch: Mapping[str, Any]) -> tuple[int, int] | None:
    """Samples and tokens of each, as its mask has them, or where there is none its ids or embeddings; None where it has
    none of them, or a mask of another kind."""
    for name, dims in (("attention_mask", 2), ("input_ids", 2), ("inputs_embeds", 3)):
        value = batch.get(name)
        if value is not None:
            return (value.shape[0], value.shape[1]) if isinstance(value, Tensor) and value.dim() == dims else None
    return None
