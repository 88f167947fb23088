"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4-7).

f(q) (f(k)^T v) / (f(q) sum f(k)) with f(x) = elu(x) + 1. The cost is N K V; no N x M map is formed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..grid import TokenGrid
from ..precision import to_accumulate
from .base import KERNELS, Kernel


def _feature(x: Tensor) -> Tensor:
    """elu(x) + 1, written with exp and relu: inductor gets the memory format of elu wrong."""
    return x.clamp(max=0).exp() + x.relu()


@KERNELS.register("linear")
class LinearAttention(Kernel):
    """Linear attention with the feature map elu + 1. It has no options.

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
        fq, fk, values = to_accumulate(_feature(q), _feature(k), v)
        y = fq @ (fk.mT @ F.pad(values, (0, 1), value=1.0))  # the last column: sums of weights
        return (y[..., :-1] / y[..., -1:]).to(v.dtype)

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 (N + M) K (V + 1) for each head."""
        return 2 * (q.numel() + k.numel()) * (v.shape[-1] + 1)
