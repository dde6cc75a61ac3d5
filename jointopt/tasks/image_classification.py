"""Image classification: a folder of images, a folder a class, or rows of an image (or its path) and a label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from jointopt.evaluation import Batch
from jointopt.rows import DataSource, labels_of, read_rows
from jointopt.tasks.metrics import classification_quality
from jointopt.tasks.task import Task
from jointopt.tasks.text_classification import on_device
from quant.errors import JointoptError

IMAGE = ("image", "img", "path", "file")


def batches(source: DataSource, processor: Any, model: nn.Module, batch_size: int) -> list[Batch]:
    """Processed as the model's own image processor (transformers) or transform (timm) does."""
    rows = read_rows(source)
    images = rows.column("image", IMAGE)
    labels = labels_of(rows, model)
    dtype = next(model.parameters()).dtype
    timm_model = not hasattr(model, "config")
    found = []
    for start in range(0, len(images), batch_size):
        opened = [_opened(image, source, rows.base) for image in images[start : start + batch_size]]
        if timm_model:
            inputs = {"x": torch.stack([processor(image) for image in opened])}
        else:
            inputs = {"pixel_values": processor(images=opened, return_tensors="pt")["pixel_values"]}
        labelled = torch.tensor(labels[start : start + batch_size])
        found.append(on_device({**{k: v.to(dtype) for k, v in inputs.items()}, "labels": labelled}, model))
    return found


def _opened(image: Any, source: DataSource, base: Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = base / str(image)
    if not path.is_file():
        raise JointoptError(f"data {source.path!r}: image {str(image)!r} does not exist")
    return Image.open(path).convert("RGB")


TASK = Task(
    "image-classification",
    "AutoModelForImageClassification",
    ("accuracy", "loss", "kl"),
    batches,
    classification_quality,
)
