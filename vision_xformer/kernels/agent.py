"""Agent attention (Han et al. 2023, arXiv 2312.08874).

With m agents A, the means of the queries in patches of the grid, and logits scaled by 1/sqrt(K):

    softmax(q A^T) softmax(A k^T) v

Agents gather the values as a few queries would, and broadcast them to the queries. Both maps are
fused attention calls, so no N x m matrix is stored; the cost is N m.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..grid import TokenGrid, grid_parts
from ..options import check_at_least
from .base import KERNELS, Kernel, Site, pool_heads
from .softmax import attend


@KERNELS.register("agent")
class Agent(Kernel):
    """Agent attention without the biases of the paper. It works on any grid.

    The paper's convolution of the values is the option ``local`` of attention.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        agents: number m of agents; fewer if there are fewer queries. Prefix tokens are excluded
            from the means.

    Raises:
        ValueError: for a number below 1.
    """

    supports_single_query = False

    def __init__(self, site: Site, *, agents: int = 49) -> None:
        super().__init__(site)
        check_at_least("agents", agents, 1)
        self.agents = agents

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend: q (B, H, N, K), k (B, G, M, K), v (B, G, M, V) -> (B, H, N, V)."""
        agents = pool_heads(q, queries, grid_parts(queries.shape, self.agents))
        return attend(q, agents, attend(agents, k, v))

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 m (N + M) (K + V) for each head."""
        agents = math.prod(grid_parts(queries.shape, self.agents))
        tokens = q.shape[-2] + k.shape[-2]
        return 2 * q.shape[0] * q.shape[1] * agents * tokens * (q.shape[-1] + v.shape[-1])

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"agents={self.agents}"
