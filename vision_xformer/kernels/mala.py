"""Magnitude-aware linear attention (Fan et al. 2025, MALA, arXiv 2507.00698).

With f = elu + 1, s = 1/sqrt(K), M keys and z_i = s/M sum_j f(q_i).f(k_j), the weight of key j for
query i is (1 + 1/z_i) s/M f(q_i).f(k_j) - z_i/M. The weights sum to 1, and in contrast to linear
attention they depend on the norm of f(q_i). The cost is N K V; there are no parameters.
"""

from __future__ import annotations

from torch import Tensor

from ..grid import TokenGrid
from ..precision import to_accumulate, without_autocast
from .base import KERNELS
from .feature_maps import elu_plus_one, summary
from .linear import SummaryKernel


@KERNELS.register("mala")
class Mala(SummaryKernel):
    """Magnitude-aware linear attention. It has no options and works on any grid.

    The paper's rotary positions, which are applied to the products but not to their sums z, are not
    supported.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
    """

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
            y = elu_plus_one(q) @ summary(elu_plus_one(k), values)
            weighted, sums = y.split((values.shape[-1], 1), -1)
            scale = self.site.key_dim**-0.5 / keys.length
            centered = weighted - sums * values.mean(-2, keepdim=True)
            return (weighted / sums + scale * centered).to(v.dtype)
