"""Efficient attention (Shen et al. 2018, arXiv 1812.01243, eq. 3-6): rho_q(q) (rho_k(k)^T v).

rho_q is a softmax over the K channels of a query, rho_k one over the M keys of a channel: each
channel of the keys is a map over the picture, and a query weighs what these maps gather.
"""

from __future__ import annotations

from torch import Tensor

from ..layout import Layout
from .base import KERNELS, Kernel, widened


@KERNELS.register("efficient")
class EfficientAttention(Kernel):
    """No options."""

    takes_rope = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
    ) -> Tensor:
        wide_q, wide_k = widened(q, k)
        context = wide_k.softmax(-2).to(v.dtype).mT @ v
        return wide_q.softmax(-1).to(v.dtype) @ context

    def flops(self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout) -> int:
        """2 (N + M) K V for each head."""
        return 2 * (q.numel() + k.numel()) * v.shape[-1]
