"""Small models saved to folders as a user has them: weights, config, and a tokenizer or image processor."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from jointopt.batches import Batch
from jointopt.models import LoadedModel, load_model
from jointopt.rows import DataSource
from jointopt.tasks import TASKS

WORDS = ("good", "bad", "fine", "poor", "a", "film", "the", "was", "very", "not")
LABELS = ("negative", "positive")
SMALL = {
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def save_tokenizer(folder: Path, known: Sequence[str] = WORDS, **changes: object) -> None:
    """One token a word."""
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[END]", *known))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]", "model_max_length": 32, **changes}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **options)
    tokenizer.save_pretrained(folder)


def save_bert(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    options = {
        **SMALL,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {name: index for index, name in enumerate(LABELS)},
    }
    BertForSequenceClassification(BertConfig(**{**options, **changes})).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(folder: Path, kind: type[PreTrainedModel] = LlamaForCausalLM, **changes: object) -> Path:
    torch.manual_seed(0)
    kind(LlamaConfig(**{**SMALL, "num_key_value_heads": 1, **changes})).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_vit(folder: Path, image_size: int = 8, **changes: object) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=image_size,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        **{"num_labels": 3, **changes},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    return folder


def save_timm(folder: Path) -> Path:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args)
    save_for_hf(model, folder, model_args=args, safe_serialization=True)
    return folder


def save_each(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of one model of every kind, by the kind's name."""
    savers = {"bert": save_bert, "llama": save_llama, "vit": save_vit, "timm": save_timm}
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in savers.items()}


def write_reviews(path: Path, count: int = 40, seed: int = 0) -> Path:
    """A csv of texts of 1 to 8 words, labelled by name."""
    random = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            words = random.choice(WORDS, size=random.integers(1, 9))
            writer.writerow([" ".join(words), LABELS[int(random.integers(2))]])
    return path


def write_images(folder: Path, each: int = 4, classes: tuple[str, ...] = ("cat", "dog", "owl"), seed: int = 0) -> Path:
    """Gray 8x8 images in a folder for each class."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def batches_of(loaded: LoadedModel, task: str, source: DataSource, size: int = 8) -> list[Batch]:
    """A source's samples as a saved model takes them."""
    return TASKS[task].samples(source, loaded.processor, loaded.model).batches(size)


def quality_of(folder: Path, task: str, source: DataSource, size: int = 8) -> dict[str, float]:
    """What a saved model is worth on a source, against itself."""
    loaded = load_model(str(folder), task, "cpu")
    batches = batches_of(loaded, task, source, size)
    with torch.no_grad():
        return TASKS[task].problem(loaded.model).quality(batches, loaded.model)(loaded.model)
