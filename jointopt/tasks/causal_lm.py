"""Causal language modelling: text, cut into pieces of one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from jointopt.evaluation import Batch
from jointopt.rows import DataSource, read_rows
from jointopt.tasks.metrics import language_quality
from jointopt.tasks.task import Task
from jointopt.tasks.text_classification import TEXT, on_device
from quant.errors import JointoptError

LENGTH = 512


def batches(source: DataSource, processor: Any, model: nn.Module, batch_size: int) -> list[Batch]:
    """All text in a row, in pieces of 512 tokens (or as many as the model takes), the rest at the end left out."""
    text = "\n".join(str(each) for each in read_rows(source).column("text", TEXT))
    tokens = torch.tensor(processor(text)["input_ids"])
    length = min(source.length or LENGTH, getattr(model.config, "max_position_embeddings", LENGTH))
    pieces = tokens[: len(tokens) // length * length].reshape(-1, length)
    if source.samples is not None:
        pieces = pieces[: source.samples]
    if not len(pieces):
        raise JointoptError(f"data {source.path!r}: {len(tokens)} tokens are less than one piece of {length}")
    return [on_device({"input_ids": part, "labels": part}, model) for part in pieces.split(batch_size)]


TASK = Task("causal-lm", "AutoModelForCausalLM", ("perplexity", "loss", "kl"), batches, language_quality)
