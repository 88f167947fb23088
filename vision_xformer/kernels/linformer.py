"""Linformer (Wang et al. 2020, arXiv 2006.04768, eq. 7): softmax(q (E^T k)^T / sqrt(K)) (F^T v).

E and F, (M, R), are learned and shared by all heads and samples: the cost is N R instead of N M.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..grid import TokenGrid, grid_parts, segment_means
from ..options import check_at_least
from ..positions import TokenTable
from .base import KERNELS, Site, merge_heads, split_heads
from .softmax import MapKernel, attend


class LengthProjection(TokenTable):
    """E or F, a row of R weights for each of the M keys. Shape: () -> (M, R).

    It is initialized as average pooling over R patches of the grid plus noise, so that the first
    steps attend to a smaller image instead of to random sums whose variance grows with M.

    Args:
        grid: grid of the M keys.
        rank: number R of weights per token.
    """

    def __init__(self, grid: TokenGrid, rank: int) -> None:
        super().__init__(grid, rank, std=0.1 / math.sqrt(grid.length))
        dtype = torch.get_default_dtype()
        pooling = torch.ones(1, 1, dtype=dtype, device="cpu")
        for size, parts in zip(grid.shape, grid_parts(grid.shape, rank), strict=True):
            pooling = torch.kron(pooling, segment_means(size, parts, dtype, "cpu"))
        cells = pooling.shape[0]
        with torch.no_grad():
            self.grid[..., :cells] += pooling.mT.view(*grid.shape, cells).to(self.grid)


def _shorten(x: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens, (B, M, C), (M, R) -> (B, R, C); a broadcasting matmul would copy x."""
    return torch.bmm(weights.mT.expand(x.shape[0], -1, -1), x)


@KERNELS.register("linformer")
class Linformer(MapKernel):
    """Softmax attention to R learned sums of the keys and values.

    The projections E and F tie the kernel to its grid of keys; ``load_weights(resize=True)``
    carries them over to another grid.

    Shape: (B, H, N, K), (B, G, M, K), (B, G, M, V) -> (B, H, N, V); G is 1 with ``one_kv_head``

    Args:
        site: heads, widths and grids of the kernel.
        rank: number R of projected keys and values; the cost is R (M + N) per channel.
        share_kv: use the keys as values, and E as F (section 4, "key-value sharing").
        one_kv_head: share keys and values between all heads.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for an invalid option, or on keys of another grid.
    """

    fixed = True

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 64,
        share_kv: bool = False,
        one_kv_head: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(site, dropout=dropout)
        check_at_least("rank", rank, 1)
        if share_kv and site.value_dim != site.key_dim:
            raise ValueError(
                f"share_kv=True: values of width {site.value_dim} cannot be keys of {site.key_dim}"
            )
        self.rank, self.share_kv = rank, share_kv
        self.kv_heads = 1 if one_kv_head else site.heads
        self.proj_k = LengthProjection(site.keys, rank)
        self.proj_v = None if share_kv else LengthProjection(site.keys, rank)

    @property
    def operand_widths(self) -> tuple[int, ...]:
        """Widths of q, k and v over all heads, see :class:`Kernel`."""
        heads, key_dim, value_dim, *_ = self.site
        values = () if self.share_kv else (self.kv_heads * value_dim,)
        return heads * key_dim, self.kv_heads * key_dim, *values

    def shorten(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Project along the length: (B, M, C), (B, M, C') -> (B, R, C), (B, R, C')."""
        e = self.proj_k().to(k.dtype)  # in exports to float16, kernels stay in float32
        if self.proj_v is None:
            short = _shorten(k, e)
            return short, short if v is k else _shorten(v, e)
        f = self.proj_v().to(k.dtype)
        if v is k:
            both = _shorten(k, torch.cat((e, f), 1))
            return both[:, : self.rank], both[:, self.rank :]
        return _shorten(k, e), _shorten(v, f)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
        *,
        shortened: bool = False,
    ) -> Tensor:
        """Attend: q (B, H, N, K), k (B, G, M, K), v (B, G, M, V) -> (B, H, N, V).

        With ``shortened``, k and v have R rows already, those of :meth:`shorten`.

        Raises:
            ValueError: for keys on another grid than that of the site.
        """
        self.check_keys(keys)
        if not shortened:
            merged_k = merge_heads(k)
            short = self.shorten(merged_k, merged_k if v is k else merge_heads(v))
            k, v = (split_heads(x, self.kv_heads) for x in short)
        one_head = k.shape[1] != q.shape[1]
        if one_head:  # fold the query heads into the sequence
            q = q.transpose(1, 2).flatten(1, 2)[:, None]
        out = attend(q, k, v, dropout=self.dropout_now)
        if one_head:
            out = out.unflatten(2, (-1, self.site.heads))[:, 0].transpose(1, 2)
        return out

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
        *,
        shortened: bool = False,
    ) -> int:
        """Count 2 R N (K + V) for each head and, unless shortened, 2 R M (K + V) for each of G.

        Keys that are the values, with ``share_kv``, are shortened once: 2 R M K.
        """
        batch, heads, length, key_dim = q.shape
        widths = key_dim + v.shape[-1]
        once = v is k and self.proj_v is None  # shortened once for both
        row = 0 if shortened else key_dim if once else widths
        return 2 * batch * self.rank * (heads * length * widths + k.shape[1] * k.shape[2] * row)

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return ", ".join(filter(None, (f"rank={self.rank}", super().extra_repr())))
