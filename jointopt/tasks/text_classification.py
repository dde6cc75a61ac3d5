"""Text classification: rows of a text and a label."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from jointopt.evaluation import Batch
from jointopt.rows import DataSource, labels_of, read_rows
from jointopt.tasks.metrics import classification_quality
from jointopt.tasks.task import Task

TEXT = ("text", "sentence", "snippet", "review", "content")


def batches(source: DataSource, processor: Any, model: nn.Module, batch_size: int) -> list[Batch]:
    """Tokenized, padded to the longest of each batch; rows of like length together, so that little is padding."""
    rows = read_rows(source)
    texts = [str(text) for text in rows.column("text", TEXT)]
    labels = labels_of(rows, model)
    limit = getattr(model.config, "max_position_embeddings", 512)
    longest = min(limit - 2 if getattr(model.config, "model_type", "") != "bert" else limit, 512)
    encoded = processor(texts, truncation=True, max_length=longest)["input_ids"]
    order = sorted(range(len(texts)), key=lambda at: len(encoded[at]))
    found = []
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        padded = processor.pad({"input_ids": [encoded[at] for at in picked]}, return_tensors="pt")
        labelled = torch.tensor([labels[at] for at in picked])
        found.append(on_device({**padded, "labels": labelled}, model))
    return found


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch's tensors where the model is."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


TASK = Task(
    "text-classification", "AutoModelForSequenceClassification", ("accuracy", "loss", "kl"), batches, classification_quality
)
