"""What mixers are compared with beside the packages; not in the library's registry."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.grid import on_grid


class Identity(vx.Mixer):
    """Each token for itself: the cost of the harness."""

    takes_heads = False

    def forward(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> Tensor:
        return x.clone()


class Pool(vx.Mixer):
    """Mean of 3 x 3 neighbours less the token itself (Yu et al. 2022, arXiv 2111.11418)."""

    takes_heads = False

    def __init__(self, dim: int, heads: None, grid: vx.TokenGrid) -> None:
        super().__init__(dim, heads, grid)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> Tensor:
        return on_grid(self.pool, x, grid) - x


class Fft2(vx.Mixer):
    """The peer of Fourier mixing: the whole complex transform, its real part kept."""

    takes_heads = False

    def forward(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> Tensor:
        return torch.fft.fft2(x.float()).real.to(x.dtype)

    def flops(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> int:
        """5 n log2 n, as FFTW counts a complex transform."""
        size = x.shape[1] * x.shape[2]
        return round(5 * x.shape[0] * size * math.log2(size))


CONTROLS: dict[str, type[vx.Mixer]] = {"identity": Identity, "pool": Pool, "fft2": Fft2}
