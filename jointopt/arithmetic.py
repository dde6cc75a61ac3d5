"""What a caller has set for speed is for training: what is measured, rounded and written is the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

backends: Any = torch.backends
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_FLOAT32 = (
    backends.cuda.matmul,
    backends.cudnn.conv,
    backends.cudnn.rnn,
    backends.mkldnn.matmul,
    backends.mkldnn.conv,
    backends.mkldnn.rnn,
)
"""What has a setting of its own for how float32 is computed."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of float32 in all of its bits, whatever a caller lets torch do; also a decorator.

    Of itself torch computes a GPU's convolutions in TF32, with 10 bits of 23: no other process, and no device that an
    export is for, would give the same scores.
    """
    newer = [each.fp32_precision for each in _FLOAT32]
    products = _older("highest", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    convolutions = _older(False, lambda: backends.cudnn.allow_tf32, partial(setattr, backends.cudnn, "allow_tf32"))
    try:
        with products, convolutions:
            for each in _FLOAT32:
                each.fp32_precision = "ieee"
            yield
    finally:
        for each, precision in zip(_FLOAT32, newer, strict=True):
            each.fp32_precision = precision


@contextmanager
def _older(full: Any, read: Callable[[], Any], write: Callable[[Any], None]) -> Iterator[None]:
    """One of torch's older settings of the same: it refuses to be read where it says something else than the newer, and
    is read by code that a quality function may call."""
    try:
        before = read()
    except RuntimeError:  # the caller has used the newer alone
        yield
        return
    write(full)
    try:
        yield
    finally:
        write(before)


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """Computes as the model's own numbers are: without autocast, and in full float32; also a decorator."""
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(full_float32())
        yield
