"""A model of the assets with what reads data for it and scores it, and its fine-tuned super-network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jointopt import Supernet, train_supernet
from jointopt.batches import Batch, without_labels
from jointopt.evaluation.evaluation import Quality
from jointopt.models import load_model
from jointopt.rows import DataSource
from jointopt.tasks import TASKS
from jointopt.tasks.task import Samples


class Loaded:
    """A model on the CPU in float32, as it is in a folder, and its task."""

    def __init__(self, folder: Path, task: str):
        found = load_model(str(folder), task, device="cpu", dtype="float32")
        self.model, self.processor, self.task = found.model, found.processor, TASKS[task]

    def samples(self, source: DataSource) -> Samples:
        return self.task.samples(source, self.processor, self.model)

    def batches(self, source: DataSource, size: int) -> list[Batch]:
        return self.samples(source).batches(size)

    def inputs(self, source: DataSource, size: int) -> list[Batch]:
        """The batches without their labels."""
        return unlabelled(self.batches(source, size))

    def quality(self, batches: Sequence[Batch], original: nn.Module | None = None) -> Quality:
        """A model's metrics on the batches, "kl" from the original among them where it is given."""
        return self.task.problem(self.model).quality(batches, original)


def tune(supernet: Supernet, file: Path, inputs: Sequence[Batch], batches: Any, steps: int, **options: Any) -> None:
    """The super-network gets the weights of `file`, which are trained now if it is not there, and is calibrated.

    Args:
        inputs: what calibrates it, before it is trained and with its new weights.
        batches, steps, options: of `train_supernet`.
    """
    if not file.is_file():
        supernet.calibrate(inputs)
        train_supernet(supernet, batches, steps, **options)
        file.parent.mkdir(parents=True, exist_ok=True)
        supernet.save(file)
    supernet.load(file)
    supernet.calibrate(inputs)


def padded(batch: Batch, length: int) -> dict[str, Tensor]:
    """Texts of one length, cut there or with columns of ones up to it."""
    return {
        name: nn.functional.pad(tensor[:, :length], (0, max(0, length - tensor.shape[1])), value=1)
        for name, tensor in batch.items()
    }


def unlabelled(batches: Sequence[Batch]) -> list[Batch]:
    return [without_labels(batch) for batch in batches]
