"""Feature maps f of linear attention: f(q) f(k)^T replaces exp(q k^T / sqrt(K)).

Each maps (B, H, N, K) to non-negative features (B, H, N, F).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forms import needs_plain
from ..grid import TokenGrid
from ..precision import to_accumulate

_EPS = 1e-6  # a query whose features would all be 0 attends to all tokens equally
_LOWEST = -40.0  # of an exponent: products of two such features are normal numbers in float32


class FeatureMap(nn.Module):
    """Base class of the feature maps.

    Shape: (B, H, N, K) -> (B, H, N, F)

    Args:
        heads: number of heads H.
        key_dim: width per head K.
        is_query: whether it maps queries; otherwise, it maps keys.

    Attributes:
        denominators: number of sums of weights that :meth:`attend` computes.
    """

    denominators: ClassVar[int] = 1

    def __init__(self, heads: int, key_dim: int, is_query: bool) -> None:
        super().__init__()
        self.key_dim, self.is_query, self.scale = key_dim, is_query, key_dim**-0.25

    def features(self, grid: TokenGrid) -> int:
        """Number of features F per head for tokens on a grid."""
        return self.key_dim

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Map the tokens of ``grid``: (B, H, N, K) -> (B, H, N, F)."""
        raise NotImplementedError

    def attend(self, fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
        """Average the values: (B, H, N, F), (B, H, M, F), (B, H, M, V) -> (B, H, N, V)."""
        return average(fq, summary(fk, v))


def summary(fk: Tensor, v: Tensor) -> Tensor:
    """f(k)^T [v, 1]: (B, H, M, F), (B, H, M, V) -> (B, H, F, V + 1)."""
    return fk.mT @ F.pad(v, (0, 1), value=1.0)


def average(fq: Tensor, context: Tensor) -> Tensor:
    """Multiply by a summary and divide by the result of its last column, the sums of weights.

    Shape: (B, H, N, F), (B, H, F, V + 1) -> (B, H, N, V)
    """
    y, total = (fq @ context).split((context.shape[-1] - 1, 1), -1)
    return y / total


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1, which stores its result, as products with it do, instead of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()  # or products would copy and store the result once more
        y = x.clamp(_LOWEST, 0.0).exp_().add_(x.relu())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return d * y.clamp(max=1)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, of any shape (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7).

    At least float32, and not computed as F.elu(x) + 1, which is rounded to 0: below -40 it is that
    of -40, so that sums of products of two features are never 0.
    """
    (wide,) = to_accumulate(x)
    if torch.compiler.is_compiling() or needs_plain(wide):
        return wide.clamp(_LOWEST, 0.0).exp() + wide.relu()
    return _EluPlusOne.apply(wide)


def _halves(x: Tensor) -> Tensor:
    """Positive and negative parts, as two sets of channels: (..., K) -> (..., 2 K)."""
    return torch.cat((x, -x), -1).relu()


class Elu(FeatureMap):
    """elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        return elu_plus_one(x)


class Relu(FeatureMap):
    """relu(x), as in EfficientViT (Cai et al. 2022, arXiv 2205.14756)."""

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        return x.relu() + _EPS


class SquaredRelu(FeatureMap):
    """relu(x)^2 (So et al. 2021, arXiv 2109.08668)."""

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        (wide,) = to_accumulate(x)
        return wide.relu().square() + _EPS


class Focused(FeatureMap):
    """|y| y^3 / |y^3| of y = relu(x) (Han et al. 2023, arXiv 2308.00442): norms are kept.

    Norms are over a head, in the authors' code over all heads. The projections absorb the learned
    scale of each channel that their code has.
    """

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        (wide,) = to_accumulate(x)
        y = wide.relu() + _EPS
        cubes = (y / y.detach().amax(-1, keepdim=True)) ** 3  # the factor cancels
        return y.norm(dim=-1, keepdim=True) / cubes.norm(dim=-1, keepdim=True) * cubes


class Exp(FeatureMap):
    """exp(x / K^(1/4)), up to a factor per query and per head of keys, which cancels."""

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        (scaled,) = to_accumulate(x * self.scale)
        if self.is_query:
            return scaled.softmax(-1)
        return (scaled - scaled.detach().amax((-2, -1), keepdim=True)).exp()


class Hedgehog(FeatureMap):
    """softmax([x W, -x W]) over channels, W learned (Zhang et al. 2024, arXiv 2402.04347, eq. 6).

    As in LoLCATs (arXiv 2410.10254), the two halves are normalized separately. W starts as the
    identity.
    """

    def __init__(self, heads: int, key_dim: int, is_query: bool) -> None:
        super().__init__(heads, key_dim, is_query)
        self.weight = nn.Parameter(torch.eye(key_dim).repeat(heads, 1, 1))

    def features(self, grid: TokenGrid) -> int:
        """Two for each channel."""
        return 2 * self.key_dim

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
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

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        return (x @ self.weight.to(x) + self.bias.to(x)).relu() + _EPS


class Polarity(FeatureMap):
    """relu(x)^p and relu(-x)^p, p learned (Meng et al. 2025, arXiv 2501.15061).

    The first half of the values is weighted by products of equal signs, the other half by products
    of opposite signs. p = 1 + 4 sigmoid(g) for each channel starts as 3; queries and keys have
    their own, in the authors' code the same. The paper's gate x W + b is left out.
    """

    denominators = 2

    def __init__(self, heads: int, key_dim: int, is_query: bool) -> None:
        super().__init__(heads, key_dim, is_query)
        self.power = nn.Parameter(torch.zeros(heads, 1, key_dim))

    def features(self, grid: TokenGrid) -> int:
        """Two for each channel."""
        return 2 * self.key_dim

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, 2 K)."""
        wide, power = to_accumulate(x, self.power)
        power = (1 + 4 * power.sigmoid()).repeat(1, 1, 2)
        return _halves(wide).clamp(min=_EPS) ** power + _EPS

    def attend(self, fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
        """Average the values: (B, H, N, 2 K), (B, H, M, 2 K), (B, H, M, V) -> (B, H, N, V)."""
        same, opposite = v.tensor_split(2, -1)
        # the signs are swapped in the summary, which is smaller than the queries
        swapped = summary(fk, opposite).roll(self.key_dim, -2)
        return torch.cat((average(fq, summary(fk, same)), average(fq, swapped)), -1)


class NormAware(FeatureMap):
    """Signed powers whose exponent grows with |q| (Meng et al. 2025, arXiv 2506.21137).

    Queries: relu(d)^p and relu(-d)^p of the direction d = q / |q|, p = 3 (0.5 + tanh |q|), so that
    long queries attend more sharply. Keys: relu(k)^3 and relu(-k)^3.
    """

    def features(self, grid: TokenGrid) -> int:
        """Two for each channel."""
        return 2 * self.key_dim

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, 2 K)."""
        (wide,) = to_accumulate(x)
        if not self.is_query:
            return _halves(wide) ** 3 + _EPS
        norm = (wide.square().sum(-1, keepdim=True) + _EPS**2).sqrt()  # differentiable at 0
        power = 3 * (0.5 + norm.tanh())
        return _halves(wide / norm).clamp(min=_EPS) ** power + _EPS


class Cosine(FeatureMap):
    """relu(q) relu(k)^T cos(pi/2 (i - j) / L) (Qin et al. 2022, arXiv 2202.08791).

    The paper has one axis of length L. On a grid the weights are multiplied by the cosines of all
    axes, each with its own length; prefix tokens are at the center of the grid.
    """

    def features(self, grid: TokenGrid) -> int:
        """2^A for each channel on A axes, by cos(a - b) = cos a cos b + sin a sin b."""
        return 2 ** len(grid.shape) * self.key_dim

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, H, N, K) -> (B, H, N, 2^A K)."""
        (x,) = to_accumulate(x)  # half precision cannot count the tokens of a long axis
        waves = x.new_ones(*grid.shape, 1)
        for axis, size in enumerate(grid.shape):
            angle = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) * (
                math.pi / 2 / max(size, 1)
            )
            both = torch.stack((angle.cos(), angle.sin()), -1)
            shape = [size if a == axis else 1 for a in range(len(grid.shape))]
            waves = (waves[..., None] * both.view(*shape, 1, 2)).flatten(-2)
        flat = waves.flatten(0, -2)
        center = flat.new_full((grid.prefix, flat.shape[-1]), 2 ** (-len(grid.shape) / 2))
        waves = torch.cat((center, flat))
        return ((x.relu() + _EPS)[..., None, :] * waves[:, :, None]).flatten(-2)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "squared_relu": SquaredRelu,
    "exp": Exp,
    "focused": Focused,
    "polarity": Polarity,
    "norm_aware": NormAware,
    "cosine": Cosine,
    "hedgehog": Hedgehog,
    "t2r": T2R,
}
