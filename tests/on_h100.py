"""Super-networks whose latency is that of an H100."""

from __future__ import annotations

from jointopt import Roofline, Supernet, load_device
from tests import zoo

FAST = Roofline(load_device("h100"))


def supernet_of(name: str, latency=FAST, **options) -> Supernet:
    return zoo.supernet_of(name, latency=latency, **{"schemes": ["none", "W8A8", "W4A16", "FP8_DYNAMIC"], **options})
