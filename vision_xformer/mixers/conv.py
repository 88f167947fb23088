"""Depth-wise convolution over the grid (Trockman & Kolter 2022, ConvMixer, arXiv 2201.09792)."""

from __future__ import annotations

from torch import Tensor

from ..grid import TokenGrid, on_grid
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
        ValueError: for an even kernel, or tokens on a grid of other axes.
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
        if len(grid.shape) != len(self.grid.shape):
            raise ValueError(
                f"{type(self).__name__} was built for a grid of {len(self.grid.shape)} axes and "
                f"cannot take {grid}"
            )
        return on_grid(self.conv, x, grid)
