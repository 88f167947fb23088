"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4-7).

f(q) (f(k)^T v) / (f(q) sum f(k)) with a feature map f. The cost is N F V; no N x M map is formed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..grid import TokenGrid
from ..precision import to_accumulate, without_autocast
from .base import KERNELS, Kernel, Site
from .feature_maps import FEATURE_MAPS


class SummaryKernel(Kernel):
    """Base of the kernels that multiply each query by one K x V summary of keys and values.

    Args:
        site: heads, widths and grids of the kernel.

    Attributes:
        denominators: number of sums of weights for each query, which are columns of the summary.
    """

    takes_rope = False
    denominators: ClassVar[int] = 1

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 (N + M) K (V + S) for each head, S the number of denominators."""
        return 2 * (q.numel() + k.numel()) * (v.shape[-1] + self.denominators)


@KERNELS.register("linear")
class LinearAttention(Kernel):
    """Linear attention with a choice of feature maps. It works on any grid.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        feature_map: "elu" (elu + 1), "relu", "squared_relu", "exp", "focused", "norm_aware" or
            "cosine", which have no weights; or "polarity", "hedgehog" or "t2r", which are learned
            separately for queries and keys.

    Raises:
        ValueError: for an unknown feature map.
    """

    takes_rope = False

    def __init__(
        self,
        site: Site,
        *,
        feature_map: Literal[
            "elu", "relu", "squared_relu", "exp", "focused", "polarity", "norm_aware", "cosine",
            "hedgehog", "t2r",
        ] = "elu",
    ) -> None:  # fmt: skip
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
        operands = to_accumulate(self.q_map(q, queries), self.k_map(k, keys), v)
        with without_autocast(q):  # sums over tokens overflow in float16
            return self.q_map.attend(*operands).to(v.dtype)

    def check_map(self) -> None:
        """Raise a ValueError for "polarity", whose halves of the values have different maps."""
        if self.q_map.denominators > 1:
            raise ValueError(
                f"feature_map {self.feature_map!r} has no attention map: the two halves of the "
                "values have different ones"
            )

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 (N + M) F (V + S) for each head, and the products of learned feature maps.

        S is 1, or 2 for "polarity", whose halves of the values have a denominator each.
        """
        width = q.shape[-1]
        sums = v.shape[-1] + self.q_map.denominators
        learned = width * width if hasattr(self.q_map, "weight") else 0
        return sum(
            2 * x.numel() // width * (self.q_map.features(grid) * sums + learned)
            for x, grid in ((q, queries), (k, keys))
        )

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"feature_map={self.feature_map}"
