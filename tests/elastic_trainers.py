"""Trainers of small elastic models, and what they trained."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from jointopt import ElasticTrainer, Recipe, SearchSpace
from tests.zoo import make


def data(count: int = 24, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2}
    defaults |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(
    folder: Path, model=None, recipe: Recipe | None = None, lora=None, callbacks=None, **options
) -> ElasticTrainer:
    model = model or make("vit")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"])
    return ElasticTrainer(
        model=model, space=space, args=arguments(folder, **options), train_dataset=data(), eval_dataset=data(8, 1),
        recipe=recipe, lora=lora, callbacks=callbacks,
    )  # fmt: skip


def weights(made: ElasticTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in made.supernet.model.state_dict().items()}


def assert_trained_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """But for biases of keys, on which nothing depends: AdamW makes whole steps of what rounding leaves of their
    gradients."""
    for name, tensor in expected.items():
        if not name.endswith("k_proj.bias"):
            assert (found[name] - tensor).abs().mean() < 1e-5, name
