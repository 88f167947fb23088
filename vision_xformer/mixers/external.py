"""External attention (Guo et al. 2021, arXiv 2105.02358, eq. 5-10): tokens against S learned ones.

norm(q M_k^T) M_v, where norm is a softmax over the N tokens, then a division by the sum over the S
memory units. Keys and values are parameters: cost N S.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.base import widened
from ..layout import Layout
from ..registry import check_at_least
from .attention import head_width
from .base import MIXERS, Mixer


@MIXERS.register("external")
class ExternalAttention(Mixer):
    """All heads share the memory (section 3.3).

    Args:
        memory: number S of memory units.
        head_dim: width K per head; dim / heads by default.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        layout: Layout,
        *,
        memory: int = 64,
        head_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads, layout)
        check_at_least("memory", memory, 1)
        self.heads, width = head_width(dim, heads, head_dim)
        # a bias would be the same for all tokens, which the softmax over them does not see
        self.query = nn.Linear(dim, self.heads * width, bias=False)
        self.memory_k = nn.Parameter(torch.randn(memory, width) * width**-0.5)
        self.memory_v = nn.Parameter(torch.randn(memory, width) * memory**-0.5)
        self.proj = nn.Linear(self.heads * width, dim)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        q = self.query(x).unflatten(-1, (self.heads, -1))
        (logits,) = widened(q @ self.memory_k.mT)
        # exp(log) divided by its sum is a softmax again, in which nothing underflows
        weights = logits.log_softmax(1).softmax(-1)
        y: Tensor = self.proj((weights.to(q.dtype) @ self.memory_v).flatten(2))
        return y
