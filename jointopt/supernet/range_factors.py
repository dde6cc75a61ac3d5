"""The learned ranges of a super-network: one factor for each layer and scheme, the same for every width.

The factor of a weight's range multiplies what calibration chooses for the slice at hand, so that a sub-network's scales
are as well defined as without it: whatever is scored, finished or exported gets its codes from the same lines,
`Supernet.clip`. The factor of a static range of inputs multiplies the one that was calibrated when its training began,
which later calibrations leave as it is, until weights are trained without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jointopt.names import LEARNED_RANGES
from quant.calibration import static_constants
from quant.formats import Scheme
from quant.learned_ranges import ends, factors, has_learnable_inputs, input_range, is_learnable, widened

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

INPUTS = "learned_ranges.inputs"
"""Under which the ranges of inputs that factors multiply stand in files."""

Key = tuple[str, str]
"""Layer path, name of the scheme."""


class LearnedRanges:
    """Factors of the ranges of a super-network's weights and static inputs, all 1 before they are trained.

    Attributes:
        values: float32 [ranges, 2], of the two ends, as `quant.learned_ranges.factors` takes them; of weights first.
        inputs: float32 [ranges of inputs, 2], the two ends that factors multiply; None where calibration's hold.
    """

    def __init__(self, supernet: Supernet, with_inputs: bool = False):
        holders = {layer.path: layer.paths for layer in supernet.family.layers}
        weights: dict[Key, Scheme] = {}
        inputs: dict[Key, Scheme] = {}
        for (path, _), scheme in supernet.schemes.items():
            if scheme.weights is not None and is_learnable(scheme.weights):
                weights[path, scheme.name] = scheme
            for each in holders[path] if has_learnable_inputs(scheme) else ():
                if not isinstance(supernet.model.get_submodule(each), nn.Embedding):
                    inputs[each, scheme.name] = scheme
        self._weights = {key: row for row, key in enumerate(weights)}
        self._inputs = {key: row for row, key in enumerate(inputs)}
        self._schemes = inputs
        paths = [path for path, _ in (*weights, *inputs)]
        self._columns = [supernet.model.get_submodule(path).get_parameter("weight")[0].numel() for path in paths]
        self.values = torch.zeros(len(paths), 2, dtype=torch.float32, device=supernet.device)
        self.inputs = torch.zeros(len(inputs), 2, dtype=torch.float32, device=supernet.device) if with_inputs else None

    def tensors(self) -> dict[str, Tensor]:
        """All there is to keep, by name."""
        return {LEARNED_RANGES: self.values, **({INPUTS: self.inputs} if self.inputs is not None else {})}

    def factor(self, path: str, scheme: Scheme) -> Tensor | None:
        """Of a weight's range in a scheme, [1 or 2, 1, 1]; None where it is not learned."""
        row = self._weights.get((path, scheme.name))
        if row is None:
            return None
        assert scheme.weights is not None
        return factors(self.values[row, : ends(scheme.weights), None, None], self._columns[row])

    def input_factor(self, path: str, name: str) -> Tensor | None:
        """Of the range of a layer's inputs in a scheme, [1 or 2, 1, 1]; None where it is not learned."""
        if self.inputs is None or (path, name) not in self._inputs:
            return None
        row = len(self._weights) + self._inputs[path, name]
        form = self._schemes[path, name].activations
        assert form is not None
        return factors(self.values[row, : ends(form), None, None], self._columns[row])

    def constants(self, path: str, name: str) -> dict[str, Tensor] | None:
        """Of a layer's static inputs in a scheme; None where calibration's hold."""
        factor = self.input_factor(path, name)
        if factor is None:
            return None
        assert self.inputs is not None
        form = self._schemes[path, name].activations
        assert form is not None
        low, high = self.inputs[self._inputs[path, name]]
        return static_constants(widened((low, high), factor.detach().flatten()), form)

    def begin_inputs(self, supernet: Supernet) -> None:
        """Takes calibration's ranges of inputs for those that factors multiply from now on."""
        ranges = []
        for (path, _), scheme in self._schemes.items():
            assert scheme.activations is not None
            ranges.append(torch.cat(input_range(scheme.activations, supernet.constants(path, scheme))))
        if ranges:
            self.inputs = torch.stack(ranges).to(self.values.device)

    def move(self, place: torch.device) -> None:
        """To a device; values that are a parameter of the model move with it."""
        self.values = self.values if isinstance(self.values, nn.Parameter) else self.values.to(place)
        self.inputs = self.inputs.to(place) if self.inputs is not None else None

    def forget_inputs(self) -> None:
        """Leaves ranges of inputs to calibration again."""
        if self.inputs is not None:
            self.inputs = None
            self.values[len(self._weights) :] = 0


def learn(supernet: Supernet) -> None:
    """Makes the ranges of a super-network a parameter of its model, from where they are; `settle` ends it.

    Raises:
        JointoptError: it has static formats and was not calibrated.
    """
    if supernet.learned is None:
        supernet.learned = LearnedRanges(supernet)
    if LEARNED_RANGES not in supernet.model._parameters:
        if supernet.learned.inputs is None:
            supernet.learned.begin_inputs(supernet)
        supernet.learned.values = nn.Parameter(supernet.learned.values)
        supernet.model.register_parameter(LEARNED_RANGES, supernet.learned.values)


def settle(supernet: Supernet) -> None:
    """Ends the training of ranges: they stay what they are, and are no parameter of the model any more."""
    if supernet.model._parameters.pop(LEARNED_RANGES, None) is not None:
        assert supernet.learned is not None
        supernet.learned.values = supernet.learned.values.detach()
