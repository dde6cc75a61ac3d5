"""Numbers: what a format is, how to round into it, how to choose its scales, how to store it."""

from quant.cache import CACHE_FORMATS, CacheFormat
from quant.errors import JointoptError
from quant.formats import ELEMENTS, SCHEMES, Element, Format, Scheme, scheme
from quant.kernels import fake_quantize, fake_quantize_activation, quantize
from quant.reference import QuantizedTensor, round_to_format

__all__ = [
    "CACHE_FORMATS",
    "ELEMENTS",
    "SCHEMES",
    "CacheFormat",
    "Element",
    "Format",
    "JointoptError",
    "QuantizedTensor",
    "Scheme",
    "fake_quantize",
    "fake_quantize_activation",
    "quantize",
    "round_to_format",
    "scheme",
]
