"""Test-time training (Han et al. 2025, ViT^3, arXiv 2512.01643): a model fitted to keys and values.

For each image and head, an inner model f is trained for one step to map the keys to the values, and
then applied to the queries. The loss is -s sum f(k).v / N with s = 1/3; each gradient g becomes
g / (|g| + 1), and the learning rate is 1. There are two kinds of inner models:

    (k W1) * silu(k W2)         of each head, W1 and W2 (K, K)
    a 3 x 3 depth-wise convolution over the grid, of one additional head

Their initial weights are learned. The cost is N K^2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import TokenGrid, on_cells
from ..kernels.base import merge_heads, split_heads
from ..precision import to_accumulate, without_autocast
from .base import MIXERS, Mixer, head_width

_SCALE = 1 / 3  # for both models: 1 / sqrt(the number of taps)


def _step(weight: Tensor, ascent: Tensor, axis: int) -> Tensor:
    """Step along ``ascent``, the negative gradient, with its norm over an axis limited to 1."""
    return weight + ascent / (ascent.norm(dim=axis, keepdim=True) + 1)


class FittedSwiGlu(nn.Module):
    """(q W1') * silu(q W2') with weights fitted to keys and values.

    Shape: (B, H, N, K) three times -> (B, H, N, K)

    Args:
        heads: number of heads H.
        width: width per head K.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(0.02 * torch.randn(heads, width, width)) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fit and apply: (B, H, N, K) -> same."""
        w1, w2 = self.w1.to(k), self.w2.to(k)
        z1, z2 = k @ w1, k @ w2
        gate = z2.sigmoid()
        target = v * (_SCALE / v.shape[2])
        silu, slope = z2 * gate, gate * (1 + z2 * (1 - gate))
        w1 = _step(w1, k.mT @ (target * silu), -2)
        w2 = _step(w2, k.mT @ (target * z1 * slope), -2)
        return (q @ w1) * F.silu(q @ w2)


class FittedConv(nn.Module):
    """A depth-wise convolution of q, 3 taps on each axis, fitted to k and v.

    Shape: (B, *grid, 3 C), q, k and v side by side -> (B, *grid, C)

    Args:
        axes: number of axes of the grid.
        dim: number of channels C.
    """

    def __init__(self, axes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(3**axes, dim))

    def forward(self, qkv: Tensor) -> Tensor:
        """Fit and apply: (B, *grid, 3 C) -> (B, *grid, C)."""
        shape, axes = qkv.shape[1:-1], tuple(range(1, qkv.ndim - 1))
        q, k, v = qkv.chunk(3, -1)
        target = v * (_SCALE / math.prod(shape))
        ascent = torch.stack([(near * target).sum(axes) for near in self._neighbors(k)], 1)
        taps = _step(self.weight.to(q), ascent, 1)
        out = torch.zeros_like(q)
        for near, tap in zip(self._neighbors(q), taps.unbind(1), strict=True):
            out = out + near * tap.view(-1, *(1 for _ in shape), tap.shape[-1])
        return out

    def _neighbors(self, x: Tensor) -> Iterator[Tensor]:
        """Views of x, zero-padded, for each tap: (B, *grid, C) each."""
        shape = x.shape[1:-1]
        padded = F.pad(x, (0, 0, *(1 for _ in range(2 * len(shape)))))
        for offset in itertools.product(range(3), repeat=len(shape)):
            inside = (slice(o, o + size) for o, size in zip(offset, shape, strict=True))
            region = (slice(None), *inside)
            yield padded[region]

    def flops(self, qkv: Tensor) -> int:
        """Count a multiply-add per tap, channel and cell, to fit and to apply."""
        return 4 * len(self.weight) * qkv.numel() // 3


@MIXERS.register("ttt")
class TestTimeTraining(Mixer):
    """Test-time training with both inner models; prefix tokens bypass the convolution.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: number of heads.
        grid: positions of the N tokens; other grids with the same number of axes work, too.
        head_dim: width K per head; dim / heads by default.
        qkv_bias: whether the projection to queries, keys and values adds a bias.

    Raises:
        ValueError: for heads that do not divide dim, or a grid with another number of axes.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        grid: TokenGrid,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, grid)
        self.heads, width = head_width(dim, heads, head_dim)
        self.widths = 3 * self.heads * width, 3 * width
        self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias)
        self.swiglu = FittedSwiGlu(self.heads, width)
        self.conv = FittedConv(len(grid.shape), width)
        self.proj = nn.Linear((self.heads + 1) * width, dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        self.check_axes(grid)
        projected = self.qkv(x)
        with without_autocast(x):  # sums over tokens overflow in float16
            (wide,) = to_accumulate(projected)
            heads, local = wide.split(self.widths, -1)
            count = len(self.swiglu.w1)
            y = merge_heads(self.swiglu(*(split_heads(t, count) for t in heads.chunk(3, -1))))
            prefix = local[:, : grid.prefix].chunk(3, -1)[0]
            cells = on_cells(self.conv, local[:, grid.prefix :], grid._replace(prefix=0))
            y = torch.cat((y, torch.cat((prefix, cells), 1)), -1).to(projected.dtype)
        return self.proj(y)
