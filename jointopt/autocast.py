"""Autocast that a caller has on is for training and scoring: what is measured, rounded and written is the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def autocast_off() -> Iterator[None]:
    """Computes as the model's own numbers are, whatever is on around it; also a decorator."""
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
