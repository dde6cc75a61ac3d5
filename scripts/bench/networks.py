"""The super-networks that benches record and measure on: real models, fine-tuned once and kept in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.evaluation import Batch, Quality
from jointopt.models import load_model
from jointopt.rows import DataSource
from jointopt.tasks import TASKS
from jointopt.training.recipe import task_loss

SCHEMES = ("none", "W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4")


@dataclass(frozen=True)
class Network:
    """A model of the assets, how it becomes a super-network, and what it is scored on.

    Attributes:
        steps: of the sandwich rule, `batch_size` samples each.
        space: what is elastic, as `SearchSpace.for_model` takes it.
    """

    model: str
    task: str
    train: DataSource
    calibrate: DataSource
    evaluate: DataSource
    space: Mapping[str, Any]
    steps: int
    batch_size: int
    learning_rate: float


def networks(assets: Path) -> dict[str, Network]:
    """The digits ViT is the quickstart's, one precision gene a layer; texts are cut short, so that thousands of
    evaluations can be afforded."""
    digits, movies, text = assets / "digits", assets / "movies", assets / "text"
    return {
        "digits_vit": Network(
            "vit-digits",
            "image-classification",
            DataSource(str(digits / "train")),
            DataSource(str(digits / "train"), samples=128),
            DataSource(str(digits / "evaluate")),
            {"depth": [2, 3, 4], "heads": [2, 3, 4], "mlp": [64, 128, 192, 256], "precision_per": "layer"},
            steps=120,
            batch_size=32,
            learning_rate=5e-4,
        ),
        "digits_resnet": Network(
            "resnet-digits",
            "image-classification",
            DataSource(str(digits / "train")),
            DataSource(str(digits / "train"), samples=128),
            DataSource(str(digits / "evaluate")),
            {"depth": [0.5, 1.0], "bottleneck": [0.5, 0.75, 1.0], "stage": [0.75, 1.0]},
            steps=120,
            batch_size=32,
            learning_rate=1e-3,
        ),
        "minilm": Network(
            "minilm",
            "text-classification",
            DataSource(str(movies / "train.csv"), length=24),
            DataSource(str(movies / "train.csv"), samples=128, length=24),
            DataSource(str(movies / "valid.csv"), samples=160, length=16),
            {"depth": [2, 3, 4, 5, 6], "heads": [3, 6, 9, 12], "mlp": [384, 768, 1152, 1536]},
            steps=240,
            batch_size=16,
            learning_rate=1e-4,
        ),
        "smollm2": Network(
            "smollm2",
            "causal-lm",
            DataSource(str(text / "calibrate.txt"), length=64),
            DataSource(str(text / "calibrate.txt"), samples=8, length=64),
            DataSource(str(text / "evaluate.txt"), samples=4, length=64),
            {"depth": [26, 27, 28, 29, 30], "mlp": [768, 1024, 1280, 1536]},
            steps=0,
            batch_size=2,
            learning_rate=1e-4,
        ),
    }


@dataclass(frozen=True)
class Ready:
    """A calibrated super-network with what it is scored by.

    Attributes:
        inputs: what it was calibrated with.
        batches: what `quality` is measured on, labels among them.
        quality: sub-network -> metrics; "kl" is the divergence from the whole, fine-tuned, unquantized model.
    """

    supernet: Supernet
    inputs: Sequence[Batch]
    batches: Sequence[Batch]
    quality: Quality


def resnet_for_digits(images: Path, folder: Path, epochs: int = 12) -> None:
    """A ResNet of two stages of three bottleneck blocks, trained on the digits in 32 x 32 pixels, as a folder."""
    names = {number: str(number) for number in range(10)}
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128], depths=[3, 3], layer_type="bottleneck", num_labels=10,
        id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    loaded = load_model(str(folder), "image-classification", device="cpu", dtype="float32")
    samples = TASKS["image-classification"].samples(DataSource(str(images)), loaded.processor, loaded.model)
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for batch in samples.epoch(epoch, 64, 0):
            loss = task_loss(model(pixel_values=batch["pixel_values"]).logits, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().save_pretrained(folder)


def prepare(name: str, assets: Path, work: Path) -> Ready:
    """The super-network, fine-tuned now or by an earlier call with the same `work`, and calibrated."""
    network = networks(assets)[name]
    torch.manual_seed(0)
    folder = assets / network.model
    if network.model == "resnet-digits":
        folder = work / network.model
        if not folder.is_dir():
            resnet_for_digits(assets / "digits" / "train", folder)
    loaded = load_model(str(folder), network.task, device="cpu", dtype="float32")
    task = TASKS[network.task]

    def batches(source: DataSource, size: int = 100) -> list[Batch]:
        return task.batches(source, loaded.processor, loaded.model, size)

    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches(network.calibrate)]
    supernet = Supernet(loaded.model, SearchSpace.for_model(loaded.model, schemes=SCHEMES, **network.space))
    tuned = work / f"{name}.safetensors"
    if network.steps and not tuned.is_file():
        work.mkdir(parents=True, exist_ok=True)
        supernet.calibrate(inputs)
        train = task.samples(network.train, loaded.processor, loaded.model)
        jointopt.train_supernet(
            supernet,
            lambda epoch: train.epoch(epoch, network.batch_size, 0),
            network.steps,
            learning_rate=network.learning_rate,
        )
        supernet.save(tuned)
    if network.steps:
        supernet.load(tuned)
    supernet.calibrate(inputs)
    scored = batches(network.evaluate)
    with supernet.active(supernet.space.largest) as whole:
        quality = task.problem(whole).quality(scored, whole)
    return Ready(supernet, inputs, scored, quality)
