"""Cross-covariance attention (El-Nouby et al. 2021, XCiT, arXiv 2106.09681): over channels.

Per head, with queries and keys of norm 1 over the tokens and a learned temperature t:

    v softmax(t k^T q),  the softmax over the K channels of the keys

The map is K x K, so the cost is N K^2. Tokens exchange information only through this map, which
depends on all of them; XCiT adds convolutions that mix neighbors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels import ValuePath
from ..kernels.base import merge_heads, split_heads
from ..precision import to_accumulate, without_autocast
from .base import MIXERS, Mixer, head_width

_EPS = 1e-12  # of norms, as in torch.nn.functional.normalize


@MIXERS.register("xca")
class CrossCovariance(Mixer):
    """Cross-covariance attention.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: number of heads.
        grid: positions of the N tokens; other grids work, too.
        head_dim: width K per head; dim / heads by default.
        qkv_bias: whether the projection to queries, keys and values adds a bias.

    Raises:
        ValueError: for heads that do not divide dim, or a width below 1.
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
        inner = self.heads * width
        self.qkv, self.proj = nn.Linear(dim, 3 * inner, bias=qkv_bias), nn.Linear(inner, dim)
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        heads = self.temperature.shape[0]
        q, k, v = (split_heads(part, heads) for part in self.qkv(x).chunk(3, -1))
        with without_autocast(x):  # sums over tokens overflow in float16
            wide_q, wide_k, temperature = to_accumulate(q, k, self.temperature)
            # dividing the small map is cheaper than normalizing q and k
            q_norm, k_norm = (
                t.norm(dim=-2, keepdim=True).clamp(min=_EPS) for t in (wide_q, wide_k)
            )
            cosines = wide_k.mT @ wide_q / k_norm.mT / q_norm
            weights = (cosines * temperature).softmax(-2).to(v.dtype)
        return self.proj(merge_heads(v @ weights))

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Raise a ValueError, because the map is between channels."""
        raise ValueError(
            f"{type(self).__name__} has no attention map: its map is between channels, not tokens"
        )
