"""Fourier mixing (Lee-Thorp et al. 2021, FNet, arXiv 2105.03824, eq. 3): Re(F_N F_D x).

It has no parameters. "grid" transforms each axis of the image instead of the row-major sequence
(FNet2D: Jeevan & Sethi 2022).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..forms import is_transformed
from ..grid import TokenGrid
from ..kernels import ValuePath
from ..precision import to_accumulate
from .base import MIXERS, Mixer


def real_fft(x: Tensor, norm: str) -> Tensor:
    """Real part of the discrete Fourier transform over all axes except the first.

    The input is real, so half of the last axis is enough: Y[-n, -d] is the conjugate of Y[n, d].

    Shape: (B, *grid, D) -> (B, *grid, D)
    """
    axes = tuple(range(1, x.ndim))
    half = torch.fft.rfftn(x, dim=axes, norm=norm).real
    # n -> -n modulo the length: reversed, with index 0 back in front
    mirrored = half[..., 1 : (x.shape[-1] + 1) // 2].flip(axes)
    mirrored = mirrored.roll((1,) * len(axes[:-1]), axes[:-1])
    return torch.cat((half, mirrored), -1)


class _RealFFT(torch.autograd.Function):
    """The operator is symmetric: it is its own backward, which needs nothing saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: str) -> Tensor:
        ctx.norm = norm
        return real_fft(x, norm)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return _RealFFT.apply(d, ctx.norm), None


@MIXERS.register("fourier")
class Fourier(Mixer):
    """Fourier mixing over tokens and channels, without parameters.

    Half precision is computed in float32, because cuFFT supports only powers of two there.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: None.
        grid: positions of the N tokens; any other grid works, too.
        axes: "sequence" (over all tokens) or "grid" (over each axis; no prefix tokens).
        norm: "backward" is the plain sum of the papers; "ortho" divides by sqrt(N D), so that the
            output has the scale of the input.

    Raises:
        ValueError: for ``axes="grid"`` with prefix tokens.
    """

    takes_heads = False

    def __init__(
        self,
        dim: int,
        heads: None,
        grid: TokenGrid,
        *,
        axes: Literal["sequence", "grid"] = "sequence",
        norm: Literal["backward", "ortho"] = "backward",
    ) -> None:
        super().__init__(dim, heads, grid)
        if axes == "grid" and grid.prefix:
            raise ValueError(
                f"axes='grid' cannot contain {grid.prefix} prefix token(s): "
                "leave class token and registers out, or use axes='sequence'"
            )
        self.axes, self.norm = axes, norm

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        (y,) = to_accumulate(x)
        if self.axes == "grid":
            y = y.unflatten(1, grid.shape)
        if is_transformed(y) or torch.jit.is_tracing():
            y = real_fft(y, self.norm)
        else:
            y = _RealFFT.apply(y, self.norm)
        return y.reshape(x.shape).to(x.dtype)

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of u = F_D x, see :class:`Mixer`.

        The output is the sum of two heads, Re(F_N) Re(u) and -Im(F_N) Im(u).
        """
        self.check(x, grid, rope)
        (y,) = to_accumulate(x)
        u = torch.fft.fft(y, norm=self.norm)
        shape = grid.shape if self.axes == "grid" else (grid.length,)

        def apply(values: Tensor) -> Tensor:
            cells = values.unflatten(2, shape)
            f = torch.fft.fftn(cells, dim=tuple(range(2, cells.ndim - 1)), norm=self.norm)
            return torch.stack((f[:, 0].real, -f[:, 1].imag), 1).view_as(values)

        def finish(y: Tensor) -> Tensor:
            return y.sum(1).to(x.dtype)

        return ValuePath(torch.stack((u.real, u.imag), 1), apply, finish, grid, grid)

    def flops(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> int:
        """Count 2.5 n log2 n for a real FFT of n = N D numbers, as FFTW (Frigo & Johnson 2005)."""
        size = x.shape[1] * x.shape[2]
        return round(2.5 * x.shape[0] * size * math.log2(size))

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"axes={self.axes}, norm={self.norm}"
