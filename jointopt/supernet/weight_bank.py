"""Fake-quantized weights, each made once: what an evaluation would otherwise compute again and again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
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
    """Entries go by lot, all but the last made, once more than `limit` bytes are held. Views ask for their layers in
    turn: what was longest unused is what the next one needs first, and with that gone nothing would be found any more.

    What is `shared` with other processes never goes, as nothing would be free by that, and is not counted.

    A sub-network takes leading slices of what is held. Where scales belong to groups, a slice of the quantized weight
    is the quantized slice. Where they belong to rows they depend on the columns, so that each width has an entry of
    its own. A scale of the whole tensor (FP8, the global one of NVFP4) stays the whole weight's in every slice, and
    is exported so. Views hold what they use: what leaves the bank stays theirs.
    """

    def __init__(self, limit: int, shared: Mapping[Key, BankedWeight] | None = None):
        self.limit = limit
        self.nbytes = 0
        self._shared = dict(shared or {})
        self._held: dict[Key, BankedWeight] = {}
        self._random = random.Random(0)

    def get(self, path: str, scheme: Scheme, columns: int | None, make: Callable[[], BankedWeight]) -> BankedWeight:
        """The entry of a layer, a scheme and a width (`columns` of its input, None for the whole), made where there is
        none."""
        key = (path, scheme.name, columns)
        found = self._shared.get(key) or self._held.get(key)
        if found is not None:
            return found
        made = make()
        while self._held and self.nbytes + made.nbytes > self.limit:
            self.nbytes -= self._held.pop(self._random.choice(list(self._held))).nbytes
        self._held[key] = made
        self.nbytes += made.nbytes
        return made

    def for_workers(self, count: int) -> WeightBank:
        """A bank for each of `count` processes: it shares what is held here, and has an equal part of what is left."""
        return WeightBank((self.limit - self.nbytes) // count, {**self._shared, **self._held})

    def make_room(self) -> None:
        """Lets go of all that takes memory of this process alone."""
        self._held.clear()
        self.nbytes = 0

    def clear(self) -> None:
        """Forgets everything: the weights have changed."""
        self.make_room()
        self._shared.clear()
