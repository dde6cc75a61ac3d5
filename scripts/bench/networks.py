"""The super-networks that benches record and measure on: real models, fine-tuned once and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loading import Loaded, tune
from originals import NAMES, untrained
from transformers import ResNetConfig, ResNetForImageClassification

from jointopt import SearchSpace, Supernet
from jointopt.batches import Batch
from jointopt.evaluation.evaluation import Quality
from jointopt.rows import DataSource
from jointopt.training.recipe import TaskLoss

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


def start(network: Network, assets: Path, work: Path) -> Loaded:
    """What becomes the super-network: an asset, or the ResNet, trained now or by an earlier call with the same
    `work`."""
    folder = assets / network.model
    if network.model == "resnet-digits":
        folder = work / network.model
        if not (folder / "model.safetensors").is_file():
            resnet_for_digits(network.train, folder)
    torch.manual_seed(0)
    return Loaded(folder, network.task)


def resnet_for_digits(images: DataSource, folder: Path) -> None:
    """A ResNet of two stages of three bottleneck blocks, trained on the digits in 32 x 32 pixels, as a folder."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128], depths=[3, 3], layer_type="bottleneck", **NAMES
    )  # fmt: skip
    begun = untrained(lambda: ResNetForImageClassification(config), folder.with_suffix(".untrained"))
    loaded = Loaded(begun, "image-classification")
    samples, model = loaded.samples(images), loaded.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(12):
        for batch in samples.epoch(epoch, 64, 0):
            loss = TaskLoss()(model(pixel_values=batch["pixel_values"]).logits, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    loaded.processor.save_pretrained(folder)
    model.eval().save_pretrained(folder)


def prepare(name: str, assets: Path, work: Path) -> Ready:
    """The super-network, fine-tuned now or by an earlier call with the same `work`, and calibrated."""
    network = networks(assets)[name]
    loaded = start(network, assets, work)
    inputs = loaded.inputs(network.calibrate, 100)
    supernet = Supernet(loaded.model, SearchSpace.for_model(loaded.model, schemes=SCHEMES, **network.space))
    if network.steps:
        train = loaded.samples(network.train)
        tune(
            supernet,
            work / f"{name}.safetensors",
            inputs,
            lambda epoch: train.epoch(epoch, network.batch_size, 0),
            network.steps,
            learning_rate=network.learning_rate,
        )
    else:
        supernet.calibrate(inputs)
    scored = loaded.batches(network.evaluate, 100)
    with supernet.active(supernet.space.largest) as whole:
        quality = loaded.quality(scored, whole)
    return Ready(supernet, inputs, scored, quality)


def all_in(space: SearchSpace, scheme: str, blocks: Iterable[str] | None = None) -> np.ndarray:
    """The largest genome, with every layer that takes it in one format, the others unquantized; with `blocks`, those
    around these are unquantized too."""
    inside = None if blocks is None else tuple(f"{name}." for name in blocks)
    at = []
    for gene, largest in zip(space.genes, space.largest, strict=True):
        formats = (scheme, "none") if inside is None or gene.name.startswith(inside) else ("none",)
        wanted = next((each for each in formats if each in gene.choices), None)
        at.append(largest if wanted is None else gene.choices.index(wanted))
    return space.canonical(np.array(at))
