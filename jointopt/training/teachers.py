"""Whether a config's teacher, which is given what the model's own tokenizer or image processor makes, can read it."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from jointopt.batches import Batch
from jointopt.tasks.image_classification import mode_of, pixels_of
from quant.errors import JointoptError

if TYPE_CHECKING:
    from jointopt.models import LoadedModel

_OF_SIZE = ("size", "crop_size", "input_size")
_OF_VALUES = (
    "do_flip_channel_order",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "mean",
    "std",
)
"""Settings of image processors of transformers, and of timm's transforms."""


def check_given_alike(own: LoadedModel, teacher: LoadedModel, batch: Batch) -> None:
    """Raises JointoptError, for its caller to name the teacher, where it was trained on other tokens, or on images of
    another size or other values.

    Args:
        batch: of the model's inputs.
    """
    if own.task == "image-classification":
        _check_images(own, teacher, next(iter(batch.values())))
    else:
        _check_tokens(own.processor, teacher.processor)


def _check_tokens(own: Any, teacher: Any) -> None:
    """A teacher may have more tokens, and others of those that were added: they stand in chats and paddings, which may
    never occur. It may lack those of the text's beginning and the like, where nothing is in their place."""
    theirs, added = teacher.get_vocab(), set(own.get_added_vocab())
    read = {own.bos_token, own.eos_token, own.cls_token, own.sep_token, own.mask_token, own.unk_token}
    called = {index: token for token, index in theirs.items()}
    for token, index in sorted(own.get_vocab().items(), key=itemgetter(1)):
        if token in added - read:
            continue
        lacking = token in read and token not in theirs and index not in called
        if theirs.get(token) != index and not lacking:
            raise JointoptError(
                f"token {index} is {called.get(index)!r}, the model's {token!r}; allowed: the same tokenizer"
            )


def _check_images(own: LoadedModel, teacher: LoadedModel, pixels: Tensor) -> None:
    """By what becomes of plain images that are as large as those the model is given: how one is resized is nothing to a
    teacher."""
    mine, theirs = (_plain_images(each, *pixels.shape[-2:]) for each in (own, teacher))
    if mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-3):
        return
    settings, others = _settings(own), _settings(teacher)
    for name in _OF_SIZE if mine.shape != theirs.shape else _OF_VALUES:
        if name in settings.keys() & others.keys() and settings[name] != others[name]:
            raise JointoptError(f"{name} is {others[name]}, the model's {settings[name]}; allowed: the same")
    raise JointoptError("its image processor makes other pixels than the model's; allowed: the same")


def _plain_images(loaded: LoadedModel, height: int, width: int) -> Tensor:
    """What a processor makes of a black image, a white one, and one whose channels differ, [3, channels, height,
    width]."""
    colours = (0, 0, 0), (255, 255, 255), (200, 100, 50)
    images = [Image.new("RGB", (width, height), colour).convert(mode_of(loaded.model)) for colour in colours]
    return torch.stack([pixels_of(loaded.processor, image) for image in images])


def _settings(loaded: LoadedModel) -> Mapping[str, Any]:
    if loaded.source.timm:
        from timm.data import resolve_model_data_config

        found = resolve_model_data_config(loaded.model)
    else:
        found = loaded.processor.to_dict()
    return {name: list(each) if isinstance(each, tuple) else each for name, each in found.items()}
