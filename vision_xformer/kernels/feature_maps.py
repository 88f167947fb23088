"""Feature maps f of linear attention: f(q) f(k)^T replaces exp(q k^T / sqrt(K)).

Each maps (B, H, N, K) to non-negative features (B, H, N, F).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..precision import to_accumulate

_EPS = 1e-6  # so that a query whose features are all 0 attends to all tokens equally


class FeatureMap(nn.Module):
    """Base class of the feature maps.

    Shape: (B, H, N, K) -> (B, H, N, F)

    Args:
        heads: number of heads H.
        key_dim: width per head K.
        is_query: whether it maps queries; otherwise keys.
    """

    ratio: ClassVar[int] = 1  # F / K

    def __init__(self, heads: int, key_dim: int, is_query: bool) -> None:
        super().__init__()
        self.is_query, self.scale = is_query, key_dim**-0.25

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, H, N, F)."""
        raise NotImplementedError


class Elu(FeatureMap):
    """elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        # not F.elu, whose memory format inductor gets wrong
        return x.clamp(max=0).exp() + x.relu()


class Relu(FeatureMap):
    """relu(x), as in EfficientViT (Cai et al. 2022, arXiv 2205.14756)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        return x.relu() + _EPS


class Exp(FeatureMap):
    """exp(x / K^(1/4)), up to a factor per query and per head of keys, which cancels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        (wide,) = to_accumulate(x)
        highest = wide.detach().amax(-1 if self.is_query else (-2, -1), keepdim=True)
        return ((wide - highest) * self.scale).exp()


class Hedgehog(FeatureMap):
    """softmax([x W, -x W]) over channels, W learned (Zhang et al. 2024, arXiv 2402.04347, eq. 6).

    As in LoLCATs (arXiv 2410.10254), the two halves are normalized separately. W starts as the
    identity.
    """

    ratio = 2

    def __init__(self, heads: int, key_dim: int, is_query: bool) -> None:
        super().__init__(heads, key_dim, is_query)
        self.weight = nn.Parameter(torch.eye(key_dim).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, H, N, 2 K)."""
        (z,) = to_accumulate((x * self.scale) @ self.weight.to(x))
        return torch.cat((z.softmax(-1), (-z).softmax(-1)), -1)


class T2R(FeatureMap):
    """relu(x W + b), W and b learned (Kasai et al. 2021, arXiv 2103.13076, eq. 3).

    W starts as the identity and b as 0.
    """

    def __init__(self, heads: int, key_dim: int, is_query: bool) -> None:
        super().__init__(heads, key_dim, is_query)
        self.weight = nn.Parameter(torch.eye(key_dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, key_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        return (x @ self.weight.to(x) + self.bias.to(x)).relu() + _EPS


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "exp": Exp,
    "hedgehog": Hedgehog,
    "t2r": T2R,
}
