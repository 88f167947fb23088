"""InLine attention (Han et al. 2024, arXiv 2412.06590): linear attention without division.

With s = 1/sqrt(K) and M keys, the weight of key j for query i is s/M q_i.k_j + (1 - z_i)/M, where
z_i = s/M sum_j q_i.k_j: the weights sum to 1 by subtraction instead of division, they may be
negative, and different queries have different weights. This is the mean of the values plus
s/M q K^T (V - mean), so neither features nor denominators are needed. The cost is N K V.
"""

from __future__ import annotations

from torch import Tensor

from ..grid import TokenGrid
from ..precision import to_accumulate, without_autocast
from .base import KERNELS
from .linear import SummaryKernel


@KERNELS.register("inline")
class Inline(SummaryKernel):
    """InLine attention. It has no options and works on any grid.

    The paper's convolution, whose weights are predicted from the tokens, is left out.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
    """

    denominators = 0

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
        wide_q, wide_k, values = to_accumulate(q, k, v)
        with without_autocast(q):  # sums over tokens overflow in float16
            mean = values.mean(-2, keepdim=True)
            context = wide_k.mT @ (values - mean)
            return (mean + wide_q @ (context * (self.site.key_dim**-0.5 / keys.length))).to(v.dtype)
