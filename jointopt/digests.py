"""One digest of tensors, by which other weights and other data under the same names are noticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor


def feed(digest: Any, tensor: Tensor) -> None:
    """Adds a tensor's type, shape and numbers to a digest of xxhash, whatever its device and strides are."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def feed_value(digest: Any, value: Any) -> None:
    """Adds what a model is called with: tensors, numbers and texts, and mappings and lists of these; no other objects,
    which have nothing to be told by in another process."""
    if isinstance(value, Tensor):
        feed(digest, value)
    elif isinstance(value, Mapping):
        for name, each in sorted(value.items(), key=repr):
            digest.update(f"{name!r}:".encode())
            feed_value(digest, each)
    elif isinstance(value, list | tuple):
        for each in value:
            digest.update(b",")
            feed_value(digest, each)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(repr(value).encode())


def digest_of(groups: Iterable[Mapping[str, Tensor]]) -> str:
    """128 bits over all names and tensors, as hexadecimal digits. The order within a group does not matter."""
    found = xxhash.xxh3_128()
    for group in groups:
        for name, tensor in sorted(group.items()):
            found.update(f"{name} ".encode())
            feed(found, tensor)
    return found.hexdigest()
