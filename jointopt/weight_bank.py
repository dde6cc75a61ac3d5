"""Fake-quantized weights, each made once: what an evaluation would otherwise compute again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quant.formats import Scheme
from quant.reference import QuantizedTensor

Key = tuple[str, str, int]


@dataclass(frozen=True)
class BankedWeight:
    """A layer's weight in one scheme: the codes and scales, and the values that they stand for."""

    quantized: QuantizedTensor
    values: Tensor


class WeightBank:
    """Least recently used first out, once `limit` bytes of values are held.

    Slices of a banked weight are exact: rows always; columns where scales belong to groups or to the whole tensor.
    Where a scale belongs to a row it depends on the columns, so that each width has an entry of its own.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._held: OrderedDict[Key, BankedWeight] = OrderedDict()
        self._bytes = 0

    def get(self, path: str, scheme: Scheme, columns: int, make: Callable[[], BankedWeight]) -> BankedWeight:
        key = (path, scheme.name, columns)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        made = make()
        self._held[key] = made
        self._bytes += made.values.nbytes
        while self._bytes > self.limit and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.values.nbytes
        return made

    def clear(self) -> None:
        self._held.clear()
        self._bytes = 0
