"""Linformer (Wang et al. 2020, arXiv 2006.04768, eq. 7): softmax(q (E^T k)^T / sqrt(K)) (F^T v).

E and F, (M, R), are learned and shared by all heads and samples: cost N R instead of N M.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layers import TokenTable
from ..layout import Layout, grid_parts, segment_means
from ..registry import check_at_least
from .base import KERNELS
from .softmax import _Softmax, attend


class LengthProjection(TokenTable):
    """E or F: a row of R weights for each token.

    Starts as the mean over R patches of the grid plus noise, so that the first steps attend to a
    smaller picture instead of to random sums whose variance grows with M.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__(layout, rank, std=0.1 / math.sqrt(layout.length))
        pooling = torch.ones(1, 1, dtype=torch.float64)
        for size, parts in zip(layout.grid, grid_parts(layout.grid, rank), strict=True):
            pooling = torch.kron(pooling, segment_means(size, parts))
        cells = pooling.shape[0]
        with torch.no_grad():
            self.grid[..., :cells] += pooling.mT.view(*layout.grid, cells).to(self.grid)


def _shorten(x: Tensor, weights: Tensor) -> Tensor:
    """(B, M, C), (M, R) -> (B, R, C). A product that broadcasts would copy x to fold it."""
    return torch.bmm(weights.mT.expand(x.shape[0], -1, -1), x)


@KERNELS.register("linformer")
class Linformer(_Softmax):
    """
    Args:
        rank: number R of keys and values that are left. Costs R (M + N) per channel.
        share_kv: the values are the keys and F is E (section 4, "key-value sharing").
        one_kv_head: all heads read the same keys and values.
        dropout: probability with which an attention weight is dropped in training.

    The projections fix the layout: another one is a ValueError, ``load_weights(resize=True)``
    carries them to it.
    """

    compresses = True

    def __init__(
        self,
        heads: int,
        key_dim: int,
        layout: Layout,
        *,
        rank: int = 64,
        share_kv: bool = False,
        one_kv_head: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(heads, key_dim, layout, dropout=dropout)
        check_at_least("rank", rank, 1)
        self.share_kv = share_kv
        self.kv_heads = 1 if one_kv_head else heads
        self.proj_k = LengthProjection(layout, rank)
        self.proj_v = None if share_kv else LengthProjection(layout, rank)

    def compress(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        e = self.proj_k()
        if self.proj_v is None:
            short = _shorten(k, e)
            return short, short if v is k else _shorten(v, e)
        f = self.proj_v()
        if v is k:
            rank = e.shape[1]
            both = _shorten(k, torch.cat((e, f), 1))
            return both[:, :rank], both[:, rank:]
        return _shorten(k, e), _shorten(v, f)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
    ) -> Tensor:
        one_head = self.kv_heads != self.heads
        if one_head:  # to the keys, a head of a token is one more query
            q = q.transpose(1, 2).flatten(1, 2)[:, None]
        out = attend(q, k, v, dropout=self.dropout_now)
        if one_head:
            out = out.unflatten(2, (-1, self.heads))[:, 0].transpose(1, 2)
        return out
