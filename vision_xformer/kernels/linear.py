"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4-7).

f(q) (f(k)^T v) / (f(q) sum f(k)) with a feature map f. The cost is N F V; no N x M map is formed.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..grid import TokenGrid
from ..precision import to_accumulate
from .base import KERNELS, Kernel, Site
from .feature_maps import FEATURE_MAPS


@KERNELS.register("linear")
class LinearAttention(Kernel):
    """Linear attention with a choice of feature maps. It works on any grid.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        feature_map: "elu" (elu + 1), "relu" or "exp", which have no weights; or "hedgehog" or
            "t2r", which are learned separately for queries and keys.

    Raises:
        ValueError: for an unknown feature map.
    """

    takes_rope = False

    def __init__(
        self,
        site: Site,
        *,
        feature_map: Literal["elu", "relu", "exp", "hedgehog", "t2r"] = "elu",
    ) -> None:
        super().__init__(site)
        self.feature_map, kind = feature_map, FEATURE_MAPS[feature_map]
        self.q_map, self.k_map = (kind(site.heads, site.key_dim, q) for q in (True, False))

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
        fq, fk, values = to_accumulate(self.q_map(q), self.k_map(k), v)
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
        """Count 2 (N + M) F (V + 1) for each head, and the products of learned feature maps."""
        width, features = q.shape[-1], q.shape[-1] * self.q_map.ratio
        learned = width * width if [*self.q_map.parameters()] else 0
        tokens = (q.numel() + k.numel()) // width
        return 2 * tokens * (features * (v.shape[-1] + 1) + learned)

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"feature_map={self.feature_map}"
