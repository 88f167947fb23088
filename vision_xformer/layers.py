"""What every backbone shares: MLP, layer scale, pooling, tables with a row for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout


class Mlp(nn.Sequential):
    """Linear, GELU, dropout, linear, dropout on the last axis: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(dropout)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al. 2021, CaiT): (..., D) -> same."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SequencePool(nn.Module):
    """Mean of tokens weighted by themselves (Hassani et al. 2021): (B, N, D) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.attention(x).softmax(1).mT @ x).squeeze(1)


class TokenTable(nn.Module):
    """A learned row for each token that knows its grid, so that it can be resized: -> (N, C).

    The grid part keeps its axes ``(*grid, C)``: nothing has to guess the shape of a saved table.
    """

    prefix: nn.Parameter | None

    def __init__(self, layout: Layout, dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.randn(*layout.grid, dim) * std)
        prefix = nn.Parameter(torch.randn(layout.prefix, dim) * std) if layout.prefix else None
        self.register_parameter("prefix", prefix)

    def forward(self) -> Tensor:
        rows = self.grid.flatten(0, -2)
        return rows if self.prefix is None else torch.cat((self.prefix, rows))


def resize_grid(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Interpolate (*old, C) to (*grid, C): bicubic on images, else linear along each axis."""
    old = tuple(table.shape[:-1])
    if len(grid) != len(old):
        raise ValueError(f"a table over the grid {old} cannot be resized to the grid {grid}")
    x = table.detach().to(torch.promote_types(table.dtype, torch.float32)).movedim(-1, 0)[None]
    if len(grid) == 2:
        x = F.interpolate(x, grid, mode="bicubic", antialias=True, align_corners=False)
    else:  # one axis after the other: only the two-dimensional modes know antialiasing
        for axis, size in enumerate(grid, start=2):
            lines = x.movedim(axis, -1)
            flat = lines.reshape(1, 1, -1, lines.shape[-1])
            flat = F.interpolate(flat, (flat.shape[2], size), mode="bilinear", antialias=True)
            x = flat.view(*lines.shape[:-1], size).movedim(-1, axis)
    return x[0].movedim(0, -1).to(table.dtype)
