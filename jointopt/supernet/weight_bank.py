"""Fake-quantized weights, each made once: what an evaluation would otherwise compute again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quant.formats import Scheme
from quant.tensors import QuantizedTensor

Key = tuple[str, str, int | None]


@dataclass(frozen=True)
class BankedWeight:
    """A layer's weight in one scheme: the codes and scales, and the values that they stand for."""

    quantized: QuantizedTensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Of the values and of all that they were made from."""
        stored = (getattr(self.quantized, name) for name in ("codes", "scale", "zero_point", "global_scale"))
        return self.values.nbytes + sum(tensor.nbytes for tensor in stored if tensor is not None)


class WeightBank:
    """Least recently used first out, once more than `limit` bytes are held; the last one asked for stays.

    A sub-network takes leading slices of what is held. Where scales belong to groups, a slice of the quantized weight
    is the quantized slice. Where they belong to rows they depend on the columns, so that each width has an entry of
    its own. A scale of the whole tensor (FP8, the global one of NVFP4) stays the whole weight's in every slice, and
    is exported so. Views hold what they use: what leaves the bank stays theirs.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[Key, BankedWeight] = OrderedDict()

    def get(self, path: str, scheme: Scheme, columns: int | None, make: Callable[[], BankedWeight]) -> BankedWeight:
        """The entry of a layer, a scheme and a width (`columns` of its input, None for the whole), made where there is
        none."""
        key = (path, scheme.name, columns)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        made = make()
        self._held[key] = made
        self.nbytes += made.nbytes
        while self.nbytes > self.limit and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self.nbytes -= oldest.nbytes
        return made

    def copy(self, limit: int) -> WeightBank:
        """A bank with another limit that holds the same tensors."""
        made = WeightBank(limit)
        made._held, made.nbytes = self._held.copy(), self.nbytes
        return made

    def clear(self) -> None:
        """Forgets everything: the weights have changed."""
        self._held.clear()
        self.nbytes = 0
