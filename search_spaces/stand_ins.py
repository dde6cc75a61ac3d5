"""What stands in a model where something was taken out of it, or apart. Needs torch alone: every modelling file begins
with it."""

from typing import Any

import torch
from torch import nn


class SkipBranch(nn.Module):
    """Stands in for a residual branch: adds nothing, whatever it is called with."""

    def __init__(self, replaced: nn.Module | None = None):
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states.new_zeros(())


class SkipAttention(SkipBranch):
    """Stands in for a pre-norm attention that returns its output and its weights."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states.new_zeros(()), None


class SkipPostNormAttention(SkipBranch):
    """Stands in for a post-norm attention, residual and normalization included: hands its input on."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None


class SkipPostNormOutput(SkipBranch):
    """Stands in for a post-norm MLP's output layer: hands the residual on."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> Any:
        return input_tensor


class SplitQKV(nn.Module):
    """timm's one qkv layer as three: so that heads leave from each, and each can be told its number format apart.

    The output is that of the fused layer: query, key and value rows, one after the other.
    """

    def __init__(self, fused: nn.Linear, device: str | None = None):
        """Three new layers, on `fused`'s device or another."""
        super().__init__()
        columns, rows, bias = fused.in_features, fused.out_features // 3, fused.bias is not None
        on, dtype = device or fused.weight.device, fused.weight.dtype
        self.q, self.k, self.v = (nn.Linear(columns, rows, bias, on, dtype) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


STAND_INS = {
    "Identity": nn.Identity, "SkipBranch": SkipBranch, "SkipAttention": SkipAttention, "SplitQKV": SplitQKV,
    "SkipPostNormAttention": SkipPostNormAttention, "SkipPostNormOutput": SkipPostNormOutput,
}  # fmt: skip
