"""Depth-wise convolution over the grid (Trockman & Kolter 2022, ConvMixer, arXiv 2201.09792)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import TokenGrid, on_grid
from ..kernels import ValuePath
from ..layers import CONV
from ..options import check_odd
from .base import MIXERS, Mixer


@MIXERS.register("conv")
class DepthwiseConv(Mixer):
    """Depth-wise convolution over the grid; prefix tokens are left unchanged.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: None.
        grid: positions of the N tokens; other grids of as many axes work, too.
        kernel: width on each axis, odd.

    Raises:
        ValueError: for an even kernel, or a grid with another number of axes.
    """

    takes_heads = False
    updates_prefix = False

    def __init__(self, dim: int, heads: None, grid: TokenGrid, *, kernel: int = 5) -> None:
        super().__init__(dim, heads, grid)
        check_odd("kernel", kernel)
        self.conv = CONV[len(grid.shape)](dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        self.check_axes(grid)
        return on_grid(self.conv, x, grid)

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its tokens, see :class:`Mixer`; a head is a channel."""
        bias = self(x.new_zeros(1, *x.shape[1:]), grid)[:, -1:]

        def apply(values: Tensor) -> Tensor:
            tokens = values.permute(0, 3, 2, 1)  # (B, V, N, D)
            y = self(tokens.flatten(0, 1), grid)
            cells = y[:, grid.prefix :] - bias
            return torch.cat((y[:, : grid.prefix], cells), 1).view_as(tokens).permute(0, 3, 2, 1)

        def finish(y: Tensor) -> Tensor:
            tokens = y.squeeze(-1).mT
            return torch.cat((tokens[:, : grid.prefix], tokens[:, grid.prefix :] + bias), 1)

        return ValuePath(x.mT.unsqueeze(-1), apply, finish, grid, grid)
