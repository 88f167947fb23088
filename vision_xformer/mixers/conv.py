"""Depth-wise convolution over the grid (Trockman & Kolter 2022, ConvMixer, arXiv 2201.09792)."""

from __future__ import annotations

from torch import Tensor

from ..layers import CONV
from ..layout import Layout
from ..projections import on_grid
from ..registry import check_odd
from .base import MIXERS, Mixer


@MIXERS.register("conv")
class DepthwiseConv(Mixer):
    """Prefix tokens pass it by.

    Args:
        kernel: width on each axis, odd.
    """

    takes_heads = False
    reaches_prefix = False

    def __init__(self, dim: int, heads: None, layout: Layout, *, kernel: int = 5) -> None:
        super().__init__(dim, heads, layout)
        check_odd("kernel", kernel)
        self.conv = CONV[len(layout.grid)](dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        if len(layout.grid) != len(self.layout.grid):
            raise ValueError(
                f"{type(self).__name__} was built for a grid of {len(self.layout.grid)} axes and "
                f"cannot take {layout}"
            )
        return on_grid(self.conv, x, layout)
