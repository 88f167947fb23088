"""Rank-augmented linear attention (Fan et al. 2024, RALA, arXiv 2411.07635).

With f = elu + 1, every key is weighted by its similarity to the mean of the queries,

    a_j = softmax_j(mean_i f(q_i).f(k_j) / sqrt(K))
    y_i = f(q_i) (sum_j a_j f(k_j)^T v_j) / f(q_i).(sum_j a_j f(k_j))

so that informative keys dominate the K x V sum, whose rank is then higher. The cost is N K V; there
are no parameters.
"""

from __future__ import annotations

from torch import Tensor

from ..grid import TokenGrid
from ..precision import to_accumulate, without_autocast
from .base import KERNELS
from .feature_maps import average, elu_plus_one, summary
from .linear import SummaryKernel


@KERNELS.register("rala")
class Rala(SummaryKernel):
    """Rank-augmented linear attention. It has no options and works on any grid.

    The authors' gate x W + b is left out (the option ``gate`` of attention has a SiLU); the paper's
    rotary positions, which are applied to the products but not to their sums, are not supported.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
    """

    supports_single_query = False

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
        (values,) = to_accumulate(v)
        with without_autocast(q):  # sums over tokens overflow in float16
            fq, fk = elu_plus_one(q), elu_plus_one(k)
            logits = fk @ (fq.mean(-2, keepdim=True) * self.site.key_dim**-0.5).mT
            # the factors scale keys in products and sums alike, whatever their own sum
            return average(fq, summary(logits.softmax(-2) * fk, values)).to(v.dtype)

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 (N + M) K (V + 1) for each head, and 2 M K for the weights of the keys."""
        return super().flops(q, k, v, queries, keys) + 2 * k.numel()
