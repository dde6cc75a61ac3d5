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


def digest_of(groups: Iterable[Mapping[str, Tensor]]) -> str:
    """128 bits over all names and tensors, as hexadecimal digits. The order within a group does not matter."""
    found = xxhash.xxh3_128()
    for group in groups:
        for name, tensor in sorted(group.items()):
            found.update(f"{name} ".encode())
            feed(found, tensor)
    return found.hexdigest()
