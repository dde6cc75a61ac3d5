"""LLM-FP4 (arXiv 2310.16836): four-bit floating point whose exponent width and bias are searched, layer by layer.

A format ExMy with a real-valued exponent bias is ExMy times a real scale (eq. 3 to 5), so a search over biases is one
over clipping ranges. Weights have a scale an output channel, activations one for all, found from a few samples and
kept: a static format. Activations may be shifted first, each channel by a power of two that moves into the weights'
columns (the pre-shifted exponent bias, section 3.3).

Only E2M1 has a home in an export. E1M2 and E3M0 are not elements of any scheme; they are to be measured, not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import JointoptError, check_count
from quant.formats import ELEMENTS, Element
from quant.reference import round_to_steps

E2M1 = ELEMENTS["fp4_e2m1"]
E1M2 = Element("fp4_e1m2", 4, -1.75, 1.75, 2, 0)
E3M0 = Element("fp4_e3m0", 4, -64, 64, 0, 0)
SEARCHED = (E2M1, E1M2, E3M0)
RATIOS = tuple(torch.linspace(0.01, 1.2, 100, dtype=torch.float32).tolist())
"""Of the largest magnitude: the clipping ranges that are tried (section 4.1)."""
ROUNDS = 3


@dataclass(frozen=True)
class FloatFormat:
    """An element with its scale: a number, or one an output channel [rows, 1]."""

    element: Element
    scale: Tensor

    @property
    def has_home(self) -> bool:
        """Whether a checkpoint can hold it."""
        return self.element.name in ELEMENTS


@dataclass(frozen=True)
class LayerFormats:
    """What was found for a linear layer.

    Attributes:
        shift: exponents of two, integers [columns]: inputs times 2^shift are what the activations' format holds, and
            weights times 2^-shift what the weights' does.
    """

    weight: FloatFormat
    activation: FloatFormat
    shift: Tensor

    @property
    def has_home(self) -> bool:
        return self.weight.has_home and self.activation.has_home

    def held_weight(self, weight: Tensor) -> Tensor:
        """The weight that shifted inputs meet, [rows, columns]."""
        return held(weight * torch.exp2(-self.shift), self.weight)

    def held_input(self, x: Tensor) -> Tensor:
        """Inputs, shifted."""
        return held(x * torch.exp2(self.shift), self.activation)


def held(x: Tensor, form: FloatFormat) -> Tensor:
    """The nearest values of the format, ties to even, saturating at its ends."""
    kind = form.element
    return round_to_steps((x / form.scale).clamp(kind.min, kind.max), kind) * form.scale


def plain(weight: Tensor, x: Tensor, element: Element = E2M1) -> LayerFormats:
    """Ranges as wide as what was seen, nothing searched: the paper's MinMax."""
    shift = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    rows = weight.abs().amax(1, keepdim=True)
    return LayerFormats(_of_range(element, rows), _of_range(element, x.abs().amax()), shift)


@torch.no_grad()
def search(
    weight: Tensor,
    x: Tensor,
    shifted: bool = True,
    elements: Sequence[Element] = SEARCHED,
    rounds: int = ROUNDS,
    ratios: Sequence[float] = RATIOS,
) -> LayerFormats:
    """Formats with the least squared error of the layer's output (algorithm 1): weights and activations in turn.

    Args:
        weight: [rows, columns].
        x: inputs, [samples, columns].
        shifted: whether activations are shifted; False is the paper's FPQ baseline.
        elements: splits of the three bits that are tried, for weights and activations each.
        rounds: at most; it ends where one changes nothing.
        ratios: of the largest magnitude: the ranges that are tried.

    Raises:
        JointoptError: a weight or inputs that are empty or not finite, or do not fit each other; no element, ratio or
            round to try.
    """
    for name, tensor in (("weight", weight), ("inputs", x)):
        if tensor.dim() != 2 or not tensor.numel() or not tensor.isfinite().all():
            raise JointoptError(f"{name}: found shape {tuple(tensor.shape)}; allowed: a matrix of finite numbers")
    for name, given in (("elements", elements), ("ratios", ratios)):
        if not len(given):
            raise JointoptError(f"{name}: found none; allowed: one or more")
    if any(not 0 < ratio < torch.inf for ratio in ratios):
        raise JointoptError(f"ratios: found {list(ratios)}; allowed: numbers above 0")
    check_count("rounds", rounds)
    if x.shape[1] != weight.shape[1]:
        raise JointoptError(f"inputs: found {x.shape[1]} columns; allowed: the weight's {weight.shape[1]}")
    weight, x = weight.float(), x.float()
    target = x @ weight.T
    shift = pre_shift(x, E2M1) if shifted else torch.zeros_like(x[0])
    moved, columns = x * torch.exp2(shift), weight * torch.exp2(-shift)

    def searched(weights: FloatFormat, activations: FloatFormat) -> tuple[FloatFormat, FloatFormat]:
        inputs = held(moved, activations)
        weights = _best(columns, lambda w: (inputs @ w.T - target).square().sum(0), elements, ratios, True)
        kept = held(columns, weights)
        return weights, _best(moved, lambda a: (a @ kept.T - target).square().sum(), elements, ratios, False)

    found = _of_range(E2M1, columns.abs().amax(1, keepdim=True)), _of_range(E2M1, moved.abs().amax())
    for _ in range(rounds):
        before, found = found, searched(*found)
        if all(a.element == b.element and torch.equal(a.scale, b.scale) for a, b in zip(before, found, strict=True)):
            break
    return LayerFormats(*found, shift)


def pre_shift(x: Tensor, element: Element) -> Tensor:
    """Exponents of two by which channels are moved towards the largest, [columns] (eq. 8 to 11).

    The largest channel stays; others are enlarged by the nearest power of two, as far as the exponent's bits reach.
    """
    assert element.mantissa is not None
    most = 2 ** (element.bits - 1 - element.mantissa) - 1
    largest = x.abs().amax(0)
    exponents = (largest.max() / largest.clamp(min=torch.finfo(torch.float32).tiny)).log2().round()
    return torch.where(largest > 0, exponents.clamp(0, most), 0.0)


def _of_range(element: Element, largest: Tensor) -> FloatFormat:
    return FloatFormat(element, largest.float().clamp(min=torch.finfo(torch.float32).tiny) / element.max)


def _best(
    values: Tensor,
    error: Callable[[Tensor], Tensor],
    elements: Sequence[Element],
    ratios: Sequence[float],
    by_row: bool,
) -> FloatFormat:
    """The format of least error, a number or with `by_row` one a row; then one element for all rows and a scale for
    each."""
    largest = values.abs().amax(1, keepdim=True) if by_row else values.abs().amax()
    chosen: FloatFormat | None = None
    least = torch.inf
    for element in elements:
        lost, scale = torch.full(largest.shape, torch.inf, dtype=torch.float32).squeeze(-1), torch.ones_like(largest)
        for ratio in ratios:
            form = _of_range(element, largest * ratio)
            tried = error(held(values, form))
            better = tried < lost
            lost = torch.where(better, tried, lost)
            scale = torch.where(better[:, None] if by_row else better, form.scale, scale)
        if float(lost.sum()) < least:
            chosen, least = FloatFormat(element, scale), float(lost.sum())
    if chosen is None:
        raise JointoptError("inputs: outputs overflow float32; allowed: smaller numbers")
    return chosen
