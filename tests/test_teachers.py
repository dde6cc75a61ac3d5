"""Teachers: they read what the model reads, and call its classes by the same names, or are refused at the start."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ViTImageProcessor

from jointopt import Distillation, JointoptError, Recipe
from jointopt.models import LoadedModel, ModelSource, load_model, load_processor
from jointopt.training.teachers import check_given_alike
from tests.saved import save_timm, save_tokenizer, save_vit
from tests.test_training import calibrated
from tests.zoo import make


def named(name: str, *labels: str) -> nn.Module:
    """A model with names for its first classes, the others called by their numbers."""
    model = make(name)
    model.config.id2label = {at: labels[at] if at < len(labels) else str(at) for at in range(model.config.num_labels)}
    return model


@pytest.mark.parametrize(
    ("own", "teacher", "said"),
    [
        (
            ("cat", "dog"),
            ("dog", "cat"),
            "label 0 is 'dog', the model's 'cat'; allowed: the same labels in",
        ),
        (("cat", "dog"), ("owl", "cat"), "label 0 is 'owl', the model's 'cat'"),
        (("cat", "dog"), ("Cat", "DOG"), None),
        (("cat", "dog"), (), None),
        (("LABEL_0", "LABEL_1"), ("cat", "dog"), None),
    ],
)
def test_a_teacher_whose_labels_are_named_otherwise_is_refused(own, teacher, said):
    supernet = calibrated("vit", model=named("vit", *own))
    recipe = Recipe(distillation=Distillation(teacher=named("vit", *teacher)))
    with nullcontext() if said is None else pytest.raises(JointoptError, match=f"^teacher: {said}"):
        recipe.check(supernet)


def test_a_teacher_s_labels_by_other_words_are_told():
    recipe = Recipe(distillation=Distillation(teacher=named("vit", "negative", "positive")))
    with pytest.warns(UserWarning, match="teacher: label 0 is 'negative', the model's 'neg': taken for the same"):
        recipe.check(calibrated("vit", model=named("vit", "neg", "pos")))


def words(folder: Path, *known: str, **changes: object) -> LoadedModel:
    """What a folder with a tokenizer of these words beside its model is loaded as, but for the model."""
    save_tokenizer(folder, known, **changes)
    task = "text-classification"
    return LoadedModel(nn.Identity(), load_processor(folder, task), task, ModelSource("m", "folder", str(folder)))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (("bad", "good"), "token 3 is 'bad', the model's 'good'; allowed: the same tokenizer"),
        (("good",), "token 4 is None, the model's 'bad'"),
        (("good", "bad", "ugly"), None),
    ],
)
def test_a_teacher_has_all_tokens_of_the_model(tmp_path, teacher, said):
    with nullcontext() if said is None else pytest.raises(JointoptError, match=f"^{said}"):
        check_given_alike(words(tmp_path / "own", "good", "bad"), words(tmp_path / "teacher", *teacher), {})


def test_tokens_that_were_added_may_be_others(tmp_path):
    own, teacher = (words(tmp_path / name, "good", "bad") for name in ("own", "teacher"))
    own.processor.add_tokens(["<tool_call>"])
    teacher.processor.add_tokens(["<think>"])
    check_given_alike(own, teacher, {})


def test_a_teacher_may_lack_a_token_that_pads(tmp_path):
    padding = words(tmp_path / "padding", "good", "bad", pad_token="[MORE]")
    assert "[MORE]" in padding.processor.get_vocab()
    check_given_alike(padding, words(tmp_path / "teacher", "good", "bad"), {})


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"image_mean": [0.4]}, r"image_mean is \[0.4\], the model's \[0.5\]; allowed: the same"),
        ({"image_std": [0.2]}, r"image_std is \[0.2\], the model's \[0.5\]"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, the model's 0.0039"),
        ({"do_normalize": False}, "do_normalize is False, the model's True"),
        ({"size": {"height": 16, "width": 16}}, "size is {'height': 16, 'width': 16}, the model's {'height': 8"),
        ({"resample": 3}, None),
        ({"do_resize": False}, None),
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [127.5]}, None),
    ],
)
def test_a_teacher_takes_the_images_that_the_model_takes(tmp_path, teacher, said):
    save_vit(tmp_path)
    own = load_model(str(tmp_path), None)
    settings = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.5], **teacher}
    ViTImageProcessor(**settings).save_pretrained(tmp_path)
    batch = {"pixel_values": torch.zeros(1, 1, 8, 8)}
    with nullcontext() if said is None else pytest.raises(JointoptError, match=f"^{said}"):
        check_given_alike(own, load_model(str(tmp_path), None), batch)


def test_a_teacher_of_timm_takes_the_images_that_the_model_takes(tmp_path):
    save_timm(tmp_path)
    own, teacher = (load_model(str(tmp_path), None) for _ in range(2))
    batch = {"x": torch.zeros(1, 3, 16, 16)}
    check_given_alike(own, teacher, batch)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.4, 0.5, 0.5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(JointoptError, match=r"^mean is \[0.4, 0.5, 0.5\], the model's \[0.5, 0.5, 0.5\]"):
        check_given_alike(own, load_model(str(tmp_path), None), batch)
