"""Multi-scale linear attention (Cai et al. 2022, EfficientViT, arXiv 2205.14756).

The queries, keys and values of the tokens have heads, and so do those of each scale: depth-wise
convolutions of the former, followed by a 1 x 1 convolution per head. Every head computes

    relu(q) (relu(k)^T v) / (relu(q) sum relu(k))

The cost is N K V for each head of each scale.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..grid import TokenGrid, on_grid
from ..kernels import ValuePath
from ..kernels.base import merge_heads
from ..kernels.feature_maps import summary
from ..layers import CONV
from ..options import check_odd
from ..precision import to_accumulate, without_autocast
from .base import MIXERS, Mixer, head_width

_EPS = 1e-5  # a query whose features are all 0 gets 0, as in the authors' code


@MIXERS.register("lite_mla")
class LiteMla(Mixer):
    """Multi-scale linear attention; prefix tokens bypass the convolutions.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: number of heads of each scale.
        grid: positions of the N tokens; other grids with the same number of axes work, too.
        scales: odd kernel sizes of the convolutions, for scales in addition to the tokens.
        head_dim: width K per head; dim / heads by default.

    Raises:
        ValueError: for heads that do not divide dim, an even kernel size, or a grid with another
            number of axes.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        grid: TokenGrid,
        *,
        scales: tuple[int, ...] = (5,),
        head_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads, grid)
        self.heads, self.head_dim = head_width(dim, heads, head_dim)
        for scale in scales:
            check_odd("scales", scale)
        inner = self.heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        conv = partial(CONV[len(grid.shape)], 3 * inner, 3 * inner, bias=False)
        self.aggregations = nn.ModuleList(
            nn.Sequential(
                conv(scale, padding=scale // 2, groups=3 * inner), conv(1, groups=3 * self.heads)
            )
            for scale in scales
        )
        self.proj = nn.Linear(inner * (1 + len(scales)), dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        return self._finish(self._attend(*self._operands(x, grid, rope)), x.dtype)

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its values, see :class:`Mixer`."""
        q, k, v = self._operands(x, grid, rope)
        finish = partial(self._finish, dtype=x.dtype)
        return ValuePath(v, partial(self._attend, q, k), finish, grid, grid)

    def _operands(self, x: Tensor, grid: TokenGrid, rope: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values of all scales, (B, heads, N, K) each."""
        self.check(x, grid, rope)
        self.check_axes(grid)
        qkv = self.qkv(x)
        all_scales = [qkv, *(on_grid(convs, qkv, grid) for convs in self.aggregations)]
        heads = torch.cat(all_scales, -1).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        return to_accumulate(*heads.chunk(3, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with without_autocast(q):  # sums over tokens overflow in float16
            y, total = (q.relu() @ summary(k.relu(), v)).split((v.shape[-1], 1), -1)
            return y / (total + _EPS)

    def _finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Project the output of all heads: (B, heads, N, K) -> (B, N, D)."""
        return self.proj(merge_heads(y.to(dtype)))
