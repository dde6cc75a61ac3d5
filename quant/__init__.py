"""Numbers: what a format is, how to round into it, how to choose its scales, how to store it.

Names are imported when first used: torch takes seconds, and who wants `quant.errors` alone does without it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CACHE_FORMATS": "quant.cache",
    "ELEMENTS": "quant.formats",
    "SCHEMES": "quant.formats",
    "CacheFormat": "quant.cache",
    "Element": "quant.formats",
    "Format": "quant.formats",
    "JointoptError": "quant.errors",
    "QuantizedTensor": "quant.reference",
    "Scheme": "quant.formats",
    "fake_quantize": "quant.kernels",
    "fake_quantize_activation": "quant.kernels",
    "quantize": "quant.kernels",
    "round_to_format": "quant.reference",
    "scheme": "quant.formats",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quant' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
