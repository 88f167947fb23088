"""Circulant attention (Han et al. 2025, arXiv 2512.21542, eq. 15-16): maps that are convolutions.

Each channel has an N x N map whose rows are shifts of one vector a over the grid, so a product with
it is a circular correlation, which Fourier transforms compute in N log N:

    a = softmax(correlation(q, k) / sqrt(N)),  y = correlation(a, v)

where correlation(q, k)[d] is the sum of q[n] k[n + d] over all cells n of the grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..forms import needs_plain
from ..grid import TokenGrid, on_cells
from ..kernels import ValuePath
from ..precision import to_accumulate
from .base import MIXERS, Mixer
from .gfnet import filter_path, filtered


def conjugate(x: Tensor) -> Tensor:
    """The complex conjugate of a tensor of any shape, without ``conj`` where it is exported."""
    return torch.complex(x.real, -x.imag) if needs_plain(x) else x.conj()


@MIXERS.register("circulant")
class Circulant(Mixer):
    """Circulant attention without the paper's gate; prefix tokens are left unchanged.

    Half precision is computed in float32, because cuFFT supports only powers of two in it.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: None; every channel has its own map.
        grid: positions of the N tokens; other grids work, too.
    """

    takes_heads = False
    updates_prefix = False

    def __init__(self, dim: int, heads: None, grid: TokenGrid) -> None:
        super().__init__(dim, heads, grid)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        return on_cells(self._attend, x, grid)

    def _attend(self, x: Tensor) -> Tensor:
        """(B, *grid, D) -> same."""
        spectrum, v = self._operands(x)
        return self.proj(filtered(v, spectrum).to(x.dtype))

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transform of the maps (B, *half, D), and the values (B, *grid, D)."""
        (qkv,) = to_accumulate(self.qkv(x))
        q, k, v = qkv.chunk(3, -1)
        shape, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
        q = q * math.prod(shape) ** -0.5
        logits = filtered(k, conjugate(torch.fft.rfftn(q, dim=axes)))
        a = logits.flatten(1, -2).softmax(1).view_as(logits)
        return conjugate(torch.fft.rfftn(a, dim=axes)), v

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its values, see :class:`Mixer`; a head is a channel."""
        self.check(x, grid, rope)
        spectrum, v = self._operands(x[:, grid.prefix :].unflatten(1, grid.shape))
        values = torch.cat((x[:, : grid.prefix].to(v), v.flatten(1, len(grid.shape))), 1)

        def finish(y: Tensor) -> Tensor:
            return on_cells(self.proj, y.to(x.dtype), grid)

        return filter_path(values, spectrum, grid, finish)

    def flops(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> int:
        """Count the layers, and 2.5 n log2 n for each of six FFTs of n = N numbers per channel."""
        batch, cells, dim = x.shape[0], x.shape[1] - grid.prefix, x.shape[2]
        transforms = round(6 * 2.5 * cells * math.log2(max(cells, 2)))
        return batch * dim * (2 * cells * 4 * dim + transforms)
