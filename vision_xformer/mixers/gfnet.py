"""Global filters (Rao et al. 2021, GFNet, arXiv 2107.00645): y = F^-1(K F(x)), K learned.

Each channel is convolved circularly with a filter as large as the grid, by Fourier transforms in
N log N. K is the complex transfer function.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..grid import TokenGrid, on_cells
from ..kernels import ValuePath
from ..precision import to_accumulate
from .base import MIXERS, Mixer


def filtered(x: Tensor, spectrum: Tensor) -> Tensor:
    """Convolve circularly over the grid, given the Fourier transform of each channel's filter.

    *half* is the grid with its last axis n cut to n // 2 + 1, the frequencies of a real signal.

    Shape: (B, *grid, D[, V]), (B or 1, *half, D) -> same as x
    """
    axes = tuple(range(1, spectrum.ndim - 1))
    shape = x.shape[1 : len(axes) + 1]
    if x.ndim > spectrum.ndim:
        spectrum = spectrum[..., None]
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * spectrum, shape, axes)


def filter_path(
    x: Tensor, spectrum: Tensor, grid: TokenGrid, finish: Callable[[Tensor], Tensor]
) -> ValuePath:
    """A convolution as a function of its tokens (B, N, D); each channel is a head."""

    def apply(values: Tensor) -> Tensor:
        tokens = values.transpose(1, 2)  # (B, N, D, V)
        return on_cells(lambda cells: filtered(cells, spectrum), tokens, grid).transpose(1, 2)

    def merge(y: Tensor) -> Tensor:
        return finish(y.squeeze(-1).mT)

    return ValuePath(x.mT.unsqueeze(-1), apply, merge, grid, grid)


class TransferFunction(nn.Module):
    """The learned K of a real filter: half of its frequencies.

    Shape: () -> (1, *half, D), complex

    It is stored as a table (*half, 2 D), real parts next to imaginary parts.
    ``load_weights(..., resize=True)`` keeps the filter for another grid: the table is then its
    Fourier transform at the other frequencies. A table does not tell whether the last axis of its
    grid was odd: that is guessed from the aspect ratio, and with a single axis it is taken as even.

    Args:
        shape: shape of the grid.
        dim: number of channels D.
    """

    def __init__(self, shape: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.shape = shape
        half = *shape[:-1], shape[-1] // 2 + 1
        self.grid = nn.Parameter(0.02 * torch.randn(*half, 2 * dim))

    def forward(self) -> Tensor:
        """The transfer function (1, *half, D)."""
        (table,) = to_accumulate(self.grid)
        return torch.complex(*table[None].chunk(2, -1))


@MIXERS.register("gfnet")
class GlobalFilter(Mixer):
    """A learned filter over the grid; prefix tokens are left unchanged. It is tied to its grid.

    Half precision is computed in float32, because cuFFT supports only powers of two in it.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: None.
        grid: positions of the N tokens.

    Raises:
        ValueError: in a call with tokens on another grid.
    """

    takes_heads = False
    updates_prefix = False
    fixed = True

    def __init__(self, dim: int, heads: None, grid: TokenGrid) -> None:
        super().__init__(dim, heads, grid)
        self.filter = TransferFunction(grid.shape, dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        return on_cells(self._convolve, x, grid)

    def _convolve(self, x: Tensor) -> Tensor:
        """(B, *grid, D) -> same."""
        (wide,) = to_accumulate(x)
        return filtered(wide, self.filter()).to(x.dtype)

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its tokens, see :class:`Mixer`; a head is a channel."""
        self.check(x, grid, rope)
        (wide,) = to_accumulate(x)
        return filter_path(wide, self.filter(), grid, lambda y: y.to(x.dtype))

    def flops(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> int:
        """Count 2.5 n log2 n for each of two FFTs of n = N numbers."""
        cells = x.shape[1] - grid.prefix
        transforms = round(2 * 2.5 * cells * math.log2(max(cells, 2)))
        return x.shape[0] * x.shape[2] * transforms
