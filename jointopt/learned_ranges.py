"""The learned ranges of a super-network: one factor for each layer and scheme, the same for every width.

A factor multiplies what calibration chooses for the slice at hand, so that a sub-network's scales are as well defined
as without it: whatever is scored, finished or exported gets its codes from the same lines, `Supernet.clip`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quant.formats import Scheme
from quant.learned_ranges import ends, factors, is_learnable

if TYPE_CHECKING:
    from jointopt.supernet import Supernet

NAME = "learned_ranges"
"""Under which they are a parameter of the model while they are trained, and stand in files."""


class LearnedRanges:
    """Factors of the ranges of a super-network's weights, all 1 before they are trained.

    Attributes:
        values: float32 [layers and schemes, 2], of the two ends, as `quant.learned_ranges.factors` takes them.
    """

    def __init__(self, supernet: Supernet):
        self._rows: dict[tuple[str, str], int] = {}
        self._columns: list[int] = []
        for (path, _), scheme in supernet._schemes.items():
            if scheme.weights is None or not is_learnable(scheme.weights) or (path, scheme.name) in self._rows:
                continue
            self._rows[path, scheme.name] = len(self._columns)
            self._columns.append(supernet.model.get_submodule(path).get_parameter("weight")[0].numel())
        self.values = torch.zeros(len(self._columns), 2, device=supernet.device)

    def factor(self, path: str, scheme: Scheme) -> Tensor | None:
        """Of a layer's range in a scheme, [1 or 2, 1, 1]; None where it is not learned."""
        row = self._rows.get((path, scheme.name))
        if row is None:
            return None
        assert scheme.weights is not None
        return factors(self.values[row, : ends(scheme.weights), None, None], self._columns[row])


def learn(supernet: Supernet) -> None:
    """Makes the ranges of a super-network's weights a parameter of its model, from where they are; `settle` ends it."""
    if supernet.learned is None:
        supernet.learned = LearnedRanges(supernet)
    if NAME not in supernet.model._parameters:
        supernet.learned.values = nn.Parameter(supernet.learned.values)
        supernet.model.register_parameter(NAME, supernet.learned.values)


def settle(supernet: Supernet) -> None:
    """Ends the training of ranges: they stay what they are, and are no parameter of the model any more."""
    if supernet.model._parameters.pop(NAME, None) is not None:
        assert supernet.learned is not None
        supernet.learned.values = supernet.learned.values.detach()
