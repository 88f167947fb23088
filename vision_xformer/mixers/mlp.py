"""Linear layers along the length, as in MLP-Mixer and gMLP.

Tolstikhin et al. 2021 (arXiv 2105.01601, eq. 1) and Liu et al. 2021 (arXiv 2105.08050, section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import TokenGrid
from ..options import check_at_least
from .base import MIXERS, Mixer


class TokenLinear(nn.Module):
    """A linear layer over tokens, the same for all channels.

    Shape: (B, N, C) -> (B, R, C)

    Args:
        length: number of tokens N.
        out_length: number of tokens R.
        std: standard deviation of the initial weights.
        bias: initial bias.
    """

    def __init__(self, length: int, out_length: int, std: float = 0.02, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_length, length) * std)
        self.bias = nn.Parameter(torch.full((out_length,), bias))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (B, N, C) -> (B, R, C)."""
        weight = self.weight.expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x)


@MIXERS.register("mlp")
class TokenMlp(Mixer):
    """Token-mixing MLP: W2 gelu(W1 x) along the length. It is tied to its grid.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: None.
        grid: positions of the N tokens.
        hidden_dim: hidden length; half the width D by default, as in the paper.

    Raises:
        ValueError: for a hidden length below 1, or tokens on another grid.
    """

    takes_heads = False
    fixed = True

    def __init__(
        self, dim: int, heads: None, grid: TokenGrid, *, hidden_dim: int | None = None
    ) -> None:
        super().__init__(dim, heads, grid)
        self.weight_grid = grid.shape
        hidden = max(1, dim // 2) if hidden_dim is None else hidden_dim
        check_at_least("hidden_dim", hidden, 1)
        self.fc1 = TokenLinear(grid.length, hidden)
        self.fc2 = TokenLinear(hidden, grid.length)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        return self.fc2(F.gelu(self.fc1(x)))


@MIXERS.register("gmlp")
class GatedMlp(Mixer):
    """Gated MLP: u * (W norm(v) + b) for (u, v) = gelu(x U), then a linear layer back to D.

    It mixes channels and tokens, so its block has no MLP of its own. W is initialized close to zero
    and b to one, so that the gate is open at first. It is tied to its grid.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: None.
        grid: positions of the N tokens.
        hidden_dim: width of u and v together, even; six times D by default, as in the paper.

    Raises:
        ValueError: for an odd width, or tokens on another grid.
    """

    takes_heads = False
    fixed = True

    def __init__(
        self, dim: int, heads: None, grid: TokenGrid, *, hidden_dim: int | None = None
    ) -> None:
        super().__init__(dim, heads, grid)
        self.weight_grid = grid.shape
        hidden = 6 * dim if hidden_dim is None else hidden_dim
        if hidden < 2 or hidden % 2:
            raise ValueError(f"hidden_dim {hidden} must be even and at least 2")
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden // 2)
        self.gate = TokenLinear(grid.length, grid.length, std=1e-6, bias=1.0)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        u, v = F.gelu(self.fc1(x)).chunk(2, -1)
        return self.fc2(u * self.gate(self.norm(v)))
