"""External attention (Guo et al. 2021, arXiv 2105.02358, eq. 5-10) to S learned keys and values.

norm(q M_k^T) M_v, where norm is a softmax over the N tokens, then a division by the sum over the S
memory units. Keys and values are parameters: the cost is N S.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels import ValuePath, merge_heads
from ..options import check_at_least
from ..precision import to_accumulate
from .base import MIXERS, Mixer, head_width


@MIXERS.register("external")
class ExternalAttention(Mixer):
    """Attention to a learned memory that all heads share (section 3.3).

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: number of heads.
        grid: positions of the N tokens; any other grid works, too.
        memory: number S of memory units.
        head_dim: width K per head; dim / heads by default.

    Raises:
        ValueError: for heads that do not divide dim, or sizes below 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        grid: TokenGrid,
        *,
        memory: int = 64,
        head_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads, grid)
        check_at_least("memory", memory, 1)
        self.heads, width = head_width(dim, heads, head_dim)
        # no bias: the softmax over the tokens cancels what is the same for all of them
        self.query = nn.Linear(dim, self.heads * width, bias=False)
        self.memory_k = nn.Parameter(torch.randn(memory, width) * width**-0.5)
        self.memory_v = nn.Parameter(torch.randn(memory, width) * memory**-0.5)
        self.proj = nn.Linear(self.heads * width, dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        return self.proj((self._weights(x) @ self.memory_v).flatten(2))

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its S memory units, see :class:`Mixer`."""
        self.check(x, grid, rope)
        weights = self._weights(x).transpose(1, 2)
        values = self.memory_v.expand(*weights.shape[:2], -1, -1)
        return ValuePath(values, lambda v: weights @ v, self._finish, grid, None)

    def _weights(self, x: Tensor) -> Tensor:
        """The weights of the memory units: (B, N, D) -> (B, N, H, S)."""
        q = self.query(x).unflatten(-1, (self.heads, -1))
        (logits,) = to_accumulate(q @ self.memory_k.mT)
        # exp(log) divided by its sum is again a softmax, in which nothing underflows
        return logits.log_softmax(1).softmax(-1).to(q.dtype)

    def _finish(self, y: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, N, D)."""
        return self.proj(merge_heads(y))
