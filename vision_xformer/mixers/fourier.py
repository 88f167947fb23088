"""Fourier mixing (Lee-Thorp et al. 2021, FNet, arXiv 2105.03824, eq. 3): Re(F_N F_D x).

No parameters. "grid" transforms each axis of the picture instead of the row-major sequence
(FNet2D: Jeevan & Sethi 2022).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.base import widened
from ..layout import Layout
from .base import MIXERS, Mixer


def real_fft(x: Tensor, norm: str) -> Tensor:
    """Re of the DFT over all axes but the first, (B, *grid, D) -> (B, *grid, D).

    The input is real, so half of the last axis is enough: Y[-n, -d] is the conjugate of Y[n, d].
    """
    axes = tuple(range(1, x.ndim))
    half = torch.fft.rfftn(x, dim=axes, norm=norm).real
    width, mirrored = half.shape[-1], slice(1, (x.shape[-1] + 1) // 2)
    y = torch.empty_like(x)
    y[..., :width] = half
    # n -> -n modulo the length: on each axis index 0 stays and the rest turns round
    for places in itertools.product((slice(0, 1), slice(1, None)), repeat=x.ndim - 2):
        left = (slice(None), *places, mirrored)
        right = (slice(None), *places, slice(width, None))
        y[right] = y[left].flip(axes)
    return y


class _RealFFT(torch.autograd.Function):
    """The operator is symmetric: its backward is itself, and nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: str) -> Tensor:
        ctx.norm = norm
        return real_fft(x, norm)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return _RealFFT.apply(d, ctx.norm), None


@MIXERS.register("fourier")
class Fourier(Mixer):
    """
    Args:
        axes: "sequence" (over tokens, prefix included) or "grid" (over each axis; no prefix).
        norm: "backward" for the plain sum of the papers, "ortho" divides by sqrt(N D), so that the
            output is of the input's size.

    Half precision is computed in float32: cuFFT takes only powers of two there.
    """

    takes_heads = False

    def __init__(
        self,
        dim: int,
        heads: None,
        layout: Layout,
        *,
        axes: str = "sequence",
        norm: str = "backward",
    ) -> None:
        super().__init__(dim, heads, layout)
        if axes not in ("sequence", "grid"):
            raise ValueError(f"axes {axes!r} must be 'sequence' or 'grid'")
        if norm not in ("backward", "ortho"):
            raise ValueError(f"norm {norm!r} must be 'backward' or 'ortho'")
        if axes == "grid" and layout.prefix:
            raise ValueError(
                f"axes='grid' has no place for {layout.prefix} prefix token(s): "
                "leave class token and registers out, or take axes='sequence'"
            )
        self.axes, self.norm = axes, norm

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        (y,) = widened(x)
        if self.axes == "grid":
            y = y.unflatten(1, layout.grid)
        y = _RealFFT.apply(y, self.norm)
        return y.reshape(x.shape).to(x.dtype)

    def flops(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> int:
        """2.5 n log2 n for a real FFT of n = N D numbers, as FFTW counts (Frigo, Johnson 2005)."""
        size = x.shape[1] * x.shape[2]
        return round(2.5 * x.shape[0] * size * math.log2(size))
