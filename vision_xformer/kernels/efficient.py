"""Efficient attention (Shen et al. 2018, arXiv 1812.01243, eq. 3-6): rho_q(q) (rho_k(k)^T v).

rho_q is a softmax over the K channels of a query, rho_k one over the M keys of a channel: each
channel of the keys is an attention map over the image, and a query is a weighting of these maps.
"""

from __future__ import annotations

from torch import Tensor

from ..grid import TokenGrid
from ..precision import to_accumulate
from .base import KERNELS, Kernel


@KERNELS.register("efficient")
class EfficientAttention(Kernel):
    """Separate softmaxes over channels and over tokens. It has no options.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
    """

    takes_rope = False

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
        wide_q, wide_k = to_accumulate(q, k)
        context = wide_k.softmax(-2).to(v.dtype).mT @ v
        return wide_q.softmax(-1).to(v.dtype) @ context

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 (N + M) K V for each head."""
        return 2 * (q.numel() + k.numel()) * v.shape[-1]
