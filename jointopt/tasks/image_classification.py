"""Image classification: a folder of images by class, or rows of an image (or its path) and a label."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from jointopt.rows import IMAGE, DataSource, check_named, class_folders, column, read_columns
from jointopt.tasks.problems import CLASSIFICATION
from jointopt.tasks.task import Samples, Task, picked_labels, place_of, read_labels
from quant.errors import JointoptError, named_line

KEPT_BYTES = 2 * 10**9
"""Processed images are kept in memory up to here; beyond, they are read again each time."""
MARKED_BYTES = 4096
"""Of each image file, that tell it from another of its size."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def samples(source: DataSource, processor: Any, model: nn.Module) -> Samples:
    """Processed as the model's own image processor (transformers) or transform (timm) does."""
    check_named(source, ("image", "label"))
    if source.length is not None:
        raise JointoptError(f"data.length: found {source.length}; allowed for images: none, it is of texts")
    columns = read_columns(source)
    images = column(columns, source.image, IMAGE, f"{source.key}.image")
    base = Path(source.path)
    folders = class_folders(base) if base.is_dir() else None
    labels = read_labels(columns, source, model, folders)
    dtype = next(model.parameters()).dtype
    mode = mode_of(model)
    kept: dict[int, Tensor] = {}

    def processed(index: int) -> Tensor:
        if index in kept:
            return kept[index]
        opened = _opened(images[index], base, f"{source.key}.image").convert(mode)
        found = pixels_of(processor, opened).to(dtype)
        if (len(kept) + 1) * found.numel() * found.element_size() <= KEPT_BYTES:
            kept[index] = found
        return found

    _check_size(model, processed(0), source)
    name = "pixel_values" if hasattr(model, "config") else "x"

    def collate(indices: Sequence[int]) -> Mapping[str, Tensor]:
        pixels = [processed(index) for index in indices]
        for index, found in zip(indices, pixels, strict=True):
            if found.shape != pixels[0].shape:
                raise JointoptError(
                    f"{source.key}: the image processor makes {tuple(found.shape[1:])} of {_told(images[index])}, "
                    f"{tuple(pixels[0].shape[1:])} of {_told(images[indices[0]])}; allowed: one that makes images of "
                    "one size, by a height and a width or a crop"
                )
        return {name: torch.stack(pixels), **picked_labels(labels, indices)}

    def mark(index: int) -> bytes:
        label = None if labels is None else labels[index].tolist()
        return f"{label} ".encode() + _mark(images[index], base, f"{source.key}.image")

    return Samples(len(images), collate, range(len(images)), place_of(model), mark, read_late=True)


def mode_of(model: nn.Module) -> str:
    """Pillow's name for images of as many channels as the model reads."""
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return MODES.get(channels, "RGB")


def pixels_of(processor: Any, image: Image.Image) -> Tensor:
    """[channels, height, width]. What a processor raises for settings that do not fit the image may be anything."""
    if not hasattr(processor, "model_input_names"):
        return processor(image)
    try:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]
    except Exception as error:
        raise JointoptError(f"model: its image processor fails on {image.mode} images: {named_line(error)}") from None


def _check_size(model: nn.Module, pixels: Tensor, source: DataSource) -> None:
    size = getattr(getattr(model, "config", None), "image_size", None)
    wanted = (size, size) if isinstance(size, int) else tuple(size or pixels.shape[1:])
    if tuple(pixels.shape[1:]) != wanted:
        raise JointoptError(
            f"{source.key}: the image processor makes images of {tuple(pixels.shape[1:])}; the model takes {wanted}"
        )


def _content(image: Any, base: Path) -> Any:
    """What Pillow opens: a path (in a table relative to its folder), or a stream of bytes."""
    content = image
    if isinstance(image, dict):
        content = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    return base.parent / content if isinstance(content, str) and not base.is_dir() else content


def _mark(image: Any, base: Path, key: str) -> bytes:
    """A file's size, how it begins and what is in its middle: of a folder of photos, decoding all would take longer
    than to train on them, and scans that are not compressed begin with the same border."""
    if isinstance(image, Image.Image):
        return image.tobytes()
    content = _content(image, base)
    try:
        with content if isinstance(content, io.BytesIO) else Path(content).open("rb", buffering=0) as opened:
            start = opened.read(MARKED_BYTES) or b""
            size = opened.seek(0, io.SEEK_END)
            opened.seek(size // 2)
            return f"{size} ".encode() + start + (opened.read(MARKED_BYTES) or b"")
    except (OSError, TypeError, ValueError) as error:
        raise JointoptError(f"{key}: {_told(image)} cannot be opened as an image: {error}") from None


def _opened(image: Any, base: Path, key: str) -> Image.Image:
    """An image from a path (relative to the table's folder), from its bytes, or as it is."""
    if isinstance(image, Image.Image):
        return _of_bytes(image, f"{key}: an image")
    try:
        opened = Image.open(_content(image, base))
        opened.load()
    except (OSError, ValueError, AttributeError, SyntaxError, Image.DecompressionBombError) as error:
        raise JointoptError(f"{key}: {_told(image)} cannot be opened as an image: {error}") from None
    return _of_bytes(opened, f"{key}: {_told(image)}")


def _told(image: Any) -> str:
    """A path, or the start of what is there in its place."""
    return repr(str(image)[:200])


def _of_bytes(image: Image.Image, told: str) -> Image.Image:
    """Pillow would cut off what is beyond 255. Cameras store what they turned as it was seen by the sensor."""
    if image.mode.startswith(("I", "F")):
        raise JointoptError(f"{told} has more than 8 bits a channel (mode {image.mode}); allowed: 8 bits")
    return ImageOps.exif_transpose(image)


TASK = Task("image-classification", "AutoModelForImageClassification", CLASSIFICATION, 32, 128, samples)
