"""Control mixers for the benchmark, in addition to the packages; not registered."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.grid import on_grid


class Identity(vx.Mixer):
    """Identity mapping; measures the overhead of the harness."""

    takes_heads = False

    def forward(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Return a copy of the tokens, (B, N, D) -> (B, N, D)."""
        return x.clone()


class Pool(vx.Mixer):
    """Average pooling over 3 x 3 neighbors minus the token (Yu et al. 2022, arXiv 2111.11418)."""

    takes_heads = False

    def __init__(self, dim: int, heads: None, grid: vx.TokenGrid) -> None:
        super().__init__(dim, heads, grid)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Pool the tokens over the grid, (B, N, D) -> (B, N, D)."""
        return on_grid(self.pool, x, grid) - x


class Fft2(vx.Mixer):
    """Baseline for Fourier mixing: the real part of the full complex 2-D transform."""

    takes_heads = False

    def forward(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Transform tokens and channels, (B, N, D) -> (B, N, D)."""
        return torch.fft.fft2(x.float()).real.to(x.dtype)

    def flops(self, x: Tensor, grid: vx.TokenGrid, rope: Tensor | None = None) -> int:
        """Count 5 n log2(n) operations, as FFTW does for a complex transform of n values."""
        size = x.shape[1] * x.shape[2]
        return round(5 * x.shape[0] * size * math.log2(size))


CONTROLS: dict[str, type[vx.Mixer]] = {"identity": Identity, "pool": Pool, "fft2": Fft2}
