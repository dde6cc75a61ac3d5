"""Trained models in full precision for the quantizers' bench, with what calibrates and scores them.

Made once from the assets and kept in a folder: MiniLM fine-tuned on movie snippets; a ViT and a ResNet trained on
scikit-learn's digits at 32x32; SmolLM2-135M fine-tuned on text, since its weights came from 4 bits in groups of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from loading import Loaded, unlabelled
from torch import nn

from jointopt.batches import Batch, without_labels
from jointopt.evaluation.evaluation import Quality
from jointopt.outputs import logits_of
from jointopt.rows import DataSource
from jointopt.training.recipe import TaskLoss

CLASSES = {number: str(number) for number in range(10)}
NAMES = {"num_labels": 10, "id2label": CLASSES, "label2id": {name: number for number, name in CLASSES.items()}}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=32, patch_size=4, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, **NAMES,
        )
    )  # fmt: skip


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic", **NAMES)
    )


@dataclass(frozen=True)
class Case:
    """An original: what it starts from, and its data.

    Attributes:
        start: the asset's name, or what makes an untrained model that reads the digits.
        metric: what it is judged by, beside KL.
    """

    task: str
    metric: str
    start: str | Callable[[], nn.Module]
    train: DataSource
    calibrate: DataSource
    evaluate: DataSource
    steps: int
    batch_size: int
    learning_rate: float


def cases(assets: Path) -> dict[str, Case]:
    movies, text, digits = assets / "movies", assets / "text", assets / "digits"
    images = {
        "train": DataSource(str(digits / "train")),
        "calibrate": DataSource(str(digits / "train"), samples=128),
        "evaluate": DataSource(str(digits / "test")),
        "batch_size": 64,
        "learning_rate": 1e-3,
    }
    return {
        "minilm": Case(
            "text-classification",
            "accuracy",
            "minilm",
            DataSource(str(movies / "train.csv"), length=64),
            DataSource(str(movies / "train.csv"), samples=128, length=64),
            DataSource(str(movies / "valid.csv"), length=64),
            steps=260,
            batch_size=32,
            learning_rate=1e-4,
        ),
        "vit": Case("image-classification", "accuracy", vit, steps=400, **images),
        "resnet": Case("image-classification", "accuracy", resnet, steps=250, **images),
        "smollm2": Case(
            "causal-lm",
            "perplexity",
            "smollm2",
            DataSource(str(text / "calibrate.txt"), length=256),
            DataSource(str(text / "calibrate.txt"), samples=32, length=256),
            DataSource(str(text / "evaluate.txt"), samples=16, length=256),
            steps=120,
            batch_size=2,
            learning_rate=1e-4,
        ),
    }


@dataclass(frozen=True)
class Original:
    """A trained model and its data.

    Attributes:
        folder: of the model, as transformers saves it.
        calibrate: batches of inputs, labels left out.
        train: the same samples in the batches that it was itself trained with.
        quality: model -> its metrics, "kl" to this model among them.
        calibration_quality: the same on the calibration batches (of a language model on four: logits are large).
    """

    folder: Path
    model: nn.Module
    calibrate: list[Batch]
    train: list[Batch]
    quality: Quality
    calibration_quality: Quality


def original(name: str, case: Case, assets: Path, work: Path) -> Original:
    """The original of that name from `work`, trained now where it is not there."""
    folder = work / name
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        start = untrained(case.start, folder.with_suffix(".untrained")) if callable(case.start) else assets / case.start
        loaded = Loaded(start, case.task)
        samples = loaded.samples(case.train)
        fine_tune(loaded.model, lambda epoch: samples.epoch(epoch, case.batch_size, 0), case.steps, case.learning_rate)
        loaded.processor.save_pretrained(folder)
        loaded.model.save_pretrained(folder)
    loaded = Loaded(folder, case.task)
    causal = case.task == "causal-lm"
    given, train = loaded.batches(case.calibrate, 2 if causal else 8), loaded.inputs(case.calibrate, case.batch_size)
    quality = loaded.quality(loaded.batches(case.evaluate, 4 if causal else 100), loaded.model)
    seen = loaded.quality(given[:4] if causal else given, loaded.model)
    return Original(folder, loaded.model, unlabelled(given), train, quality, seen)


def untrained(make: Callable[[], nn.Module], folder: Path) -> Path:
    """The model and an image processor for it, saved."""
    from transformers import ViTImageProcessor

    make().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def fine_tune(model: nn.Module, epochs: Callable, steps: int, learning_rate: float) -> None:
    """AdamW with a warm-up of a tenth and a cosine to zero, in bfloat16 autocast; in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    step = epoch = 0
    while step < steps:
        for batch in epochs(epoch):
            with torch.autocast("cpu", torch.bfloat16):
                loss = TaskLoss()(logits_of(model, without_labels(batch)), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 20 == 0:
                print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
            if step == steps:
                break
        epoch += 1
    model.eval()
