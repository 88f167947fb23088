"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4-7) with f(x) = elu(x) + 1:

f(q) (f(k)^T v) / (f(q) sum f(k)). Cost N K V; nothing N x M exists.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..layout import Layout
from .base import KERNELS, Kernel, widened


def _feature(x: Tensor) -> Tensor:
    """elu(x) + 1, of parts whose memory order compilers know (elu's they get wrong)."""
    return x.clamp(max=0).exp() + x.relu()


@KERNELS.register("linear")
class LinearAttention(Kernel):
    """No options: the feature map has no parameters and no scale."""

    takes_rope = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
    ) -> Tensor:
        fq, fk, values = widened(_feature(q), _feature(k), v)
        y = fq @ (fk.mT @ F.pad(values, (0, 1), value=1.0))  # the last column: sums of weights
        return (y[..., :-1] / y[..., -1:]).to(v.dtype)

    def flops(self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout) -> int:
        """2 (N + M) K (V + 1) for each head."""
        return 2 * (q.numel() + k.numel()) * (v.shape[-1] + 1)
