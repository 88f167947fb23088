"""Linear maps along the length: MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601, eq. 1) and
gMLP (Liu et al. 2021, arXiv 2105.08050, section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Layout
from ..registry import check_at_least
from .base import MIXERS, Mixer


class TokenLinear(nn.Module):
    """A linear map of tokens, for all channels alike: (B, N, C) -> (B, R, C)."""

    def __init__(self, length: int, out_length: int, std: float = 0.02, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_length, length) * std)
        self.bias = nn.Parameter(torch.full((out_length,), bias))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x)


@MIXERS.register("mlp")
class TokenMlp(Mixer):
    """Linear, GELU, linear along the length: W2 gelu(W1 x). It fixes the layout.

    Args:
        hidden_dim: tokens between the two; by default half the width D, as in the paper.
    """

    takes_heads = False
    fixed_layout = True

    def __init__(
        self, dim: int, heads: None, layout: Layout, *, hidden_dim: int | None = None
    ) -> None:
        super().__init__(dim, heads, layout)
        hidden = max(1, dim // 2) if hidden_dim is None else hidden_dim
        check_at_least("hidden_dim", hidden, 1)
        self.fc1 = TokenLinear(layout.length, hidden)
        self.fc2 = TokenLinear(hidden, layout.length)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


@MIXERS.register("gmlp")
class GatedMlp(Mixer):
    """u * (W norm(v) + b) of (u, v) = gelu(x U), then a map back to D. It fixes the layout.

    This is channel and token mixing at once: its block has no MLP beside it. W starts near nothing
    and b as one, so that the gate lets all through at first.

    Args:
        hidden_dim: width of u and v together, even; by default six times D, as in the paper.
    """

    takes_heads = False
    fixed_layout = True

    def __init__(
        self, dim: int, heads: None, layout: Layout, *, hidden_dim: int | None = None
    ) -> None:
        super().__init__(dim, heads, layout)
        hidden = 6 * dim if hidden_dim is None else hidden_dim
        if hidden < 2 or hidden % 2:
            raise ValueError(f"hidden_dim {hidden} must be even and at least 2")
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden // 2)
        self.gate = TokenLinear(layout.length, layout.length, std=1e-6, bias=1.0)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        u, v = F.gelu(self.fc1(x)).chunk(2, -1)
        y: Tensor = self.fc2(u * self.gate(self.norm(v)))
        return y
