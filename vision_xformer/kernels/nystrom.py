"""Nystromformer (Xiong et al. 2021, arXiv 2102.03902, eq. 13-15) with landmarks ql, kl:

softmax(q kl^T) pinv(softmax(ql kl^T)) softmax(ql k^T) v  +  depth-wise convolution of v,

all logits scaled by 1/sqrt(K). The two outer maps are fused attention calls, so nothing N x m is
stored. pinv is a fixed number of Newton-Schulz steps (eq. 14): a regularised inverse that the
method relies on. Its start is scaled for each matrix alone, so no image sees its batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layout import Layout, grid_parts, pool_grid
from ..registry import check_at_least
from .base import KERNELS, Kernel, widened, without_autocast
from .softmax import attend

_BLOCK = 32  # rows of one Toeplitz product: the smallest that keeps it a dense one


def newton_schulz_pinv(a: Tensor, iterations: int) -> Tensor:
    """(*, m, m), rows that sum to 1, at least one axis in front -> pseudo-inverse (eq. 14)."""
    norms = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = (a.mT / norms[..., None, None]).flatten(0, -3)
    flat = a.flatten(0, -3)
    for _ in range(iterations):  # z (13 - az (15 - az (7 - az))) / 4, and nothing but products
        az = flat @ z
        inner = torch.baddbmm(az, az, az, beta=-7)
        inner = torch.baddbmm(az, az, inner, beta=15)
        z = torch.baddbmm(z, z, inner, beta=3.25, alpha=-0.25)
    return z.view_as(a)


def depthwise_conv(v: Tensor, taps: Tensor) -> Tensor:
    """out[b, h, i] = sum_t taps[h, t] v[b, h, i + t - T // 2]: (B, H, M, V), (H, T) -> same as v.

    As dense products with the banded Toeplitz matrix, block by block: several times faster than a
    grouped convolution, whose weight gradient is moreover wrong on some CPUs.
    """
    (batch, heads, length, channels), width = v.shape, taps.shape[1]
    if batch == 0:
        return v * taps.sum()
    block = max(_BLOCK, width)
    blocks = -(-length // block)
    # Row i of the matrix holds the taps from column i on. Repeating a row padded to one more than
    # the matrix is wide and reading it at that width shifts each row by one.
    band = F.pad(taps, (0, 2 * block + 1 - width)).repeat(1, block)
    band = band[:, : 2 * block * block].view(heads, block, 2 * block)
    # (H, block, B * blocks * V): one product for all blocks, each with the block after it. The
    # one that spans two samples is thrown away.
    before = width // 2
    x = F.pad(v, (0, 0, before, (blocks + 1) * block - length - before))
    x = x.unflatten(2, (blocks + 1, block)).permute(1, 3, 0, 2, 4).flatten(2)
    y = torch.baddbmm(band[..., :block] @ x[..., :-channels], band[..., block:], x[..., channels:])
    y = F.pad(y, (0, channels)).unflatten(2, (batch, blocks + 1, channels))[:, :, :, :blocks]
    return y.permute(2, 0, 3, 1, 4).flatten(2, 3)[:, :, :length]


def nearest_keys(q_layout: Layout, k_layout: Layout, device: torch.device) -> Tensor:
    """(N,) index of the key that lies under each query, where one grid is the other's strided.

    Prefix tokens map to the prefix; where the keys have none, to the first key.
    """
    index = torch.zeros((), dtype=torch.long, device=device)
    for size, keys in zip(q_layout.grid, k_layout.grid, strict=True):
        skipped, shared = -(-keys // size), -(-size // keys)  # one of them is 1
        place = (torch.arange(size, device=device) * skipped // shared).clamp(max=keys - 1)
        index = index[..., None] * keys + place
    prefix = torch.arange(q_layout.prefix, device=device).clamp(max=max(k_layout.prefix - 1, 0))
    return torch.cat((prefix, index.flatten() + k_layout.prefix))


def check_sizes(landmarks: int, iterations: int, residual_kernel: int) -> None:
    """Raise a ValueError for a value that cannot be."""
    check_at_least("landmarks", landmarks, 1)
    check_at_least("iterations", iterations, 0)
    if residual_kernel < 0 or (residual_kernel % 2 == 0 and residual_kernel != 0):
        raise ValueError(f"residual_kernel {residual_kernel} must be odd, or 0 for none")


@KERNELS.register("nystrom")
class Nystrom(Kernel):
    """
    Args:
        landmarks: number m of landmarks; fewer where there are fewer tokens. Costs N m + m^3.
        iterations: Newton-Schulz steps.
        residual_kernel: taps of the convolution of v along the sequence, odd; 0 for none.
        segments: what a landmark is the mean of: "grid" rectangular patches of the picture,
            "sequence" runs of the row-major sequence, as in the paper. Any N: the segments differ
            by at most one row, and nothing is padded. Prefix tokens are never in a landmark.
    """

    takes_one_query = False

    def __init__(
        self,
        heads: int,
        key_dim: int,
        layout: Layout,
        *,
        landmarks: int = 64,
        iterations: int = 6,
        residual_kernel: int = 33,
        segments: str = "grid",
    ) -> None:
        super().__init__(heads, key_dim, layout)
        check_sizes(landmarks, iterations, residual_kernel)
        if segments not in ("grid", "sequence"):
            raise ValueError(f"segments {segments!r} must be 'grid' or 'sequence'")
        self.landmarks, self.iterations, self.segments = landmarks, iterations, segments
        self.residual = None
        if residual_kernel:
            bound = residual_kernel**-0.5
            self.residual = nn.Parameter(
                torch.empty(heads, residual_kernel).uniform_(-bound, bound)
            )

    def _landmark_means(self, x: Tensor, layout: Layout, parts: tuple[int, ...]) -> Tensor:
        """(B, H, N, K) -> (B, H, m, K). Heads are merged so that the inner axis is long."""
        if self.segments == "sequence":
            layout = Layout((math.prod(layout.grid),), layout.prefix)
        tokens = x.transpose(1, 2).flatten(2)
        return pool_grid(tokens, layout, parts).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _parts(self, q_layout: Layout, k_layout: Layout) -> tuple[int, ...]:
        """One choice for queries and keys, so that landmark i lies at one place in both."""
        if self.segments == "sequence":
            shorter = min(math.prod(q_layout.grid), math.prod(k_layout.grid))
            return (min(self.landmarks, shorter),)
        smaller = tuple(map(min, q_layout.grid, k_layout.grid))
        return grid_parts(smaller, self.landmarks)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
    ) -> Tensor:
        if len(q_layout.grid) != len(k_layout.grid):
            raise ValueError(f"queries on {q_layout} and keys on {k_layout} differ in their axes")
        parts = self._parts(q_layout, k_layout)
        q_marks = self._landmark_means(q, q_layout, parts)
        k_marks = self._landmark_means(k, k_layout, parts)
        context = attend(q_marks, k, v)
        with without_autocast(q):  # entries of the inverse are large and cancel
            ql, kl, c = widened(q_marks, k_marks, context)
            core = (ql @ kl.mT * self.key_dim**-0.5).softmax(-1)
            # Made again in the backward pass: the steps hold five matrices each, with 64 landmarks
            # more than all else up to 500 tokens.
            inverse = checkpoint(
                newton_schulz_pinv, core, self.iterations,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            context = inverse @ c
        out = attend(q, k_marks, context.to(q.dtype))
        if self.residual is None:
            return out
        local = depthwise_conv(v, self.residual)
        if q_layout != k_layout:
            local = local[:, :, nearest_keys(q_layout, k_layout, v.device)]
        return out + local

    def flops(self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout) -> int:
        """2 m (N + M) (K + V) + 2 m^2 (K + V) + 8 m^3 iterations + 2 M V taps for each head."""
        landmarks = math.prod(self._parts(q_layout, k_layout))
        keys, value_dim = v.shape[-2:]
        widths = q.shape[-1] + value_dim
        outer = 2 * landmarks * (q.shape[-2] + keys) * widths
        core = 2 * landmarks**2 * widths + 8 * landmarks**3 * self.iterations
        taps = 0 if self.residual is None else self.residual.shape[1]
        return q.shape[0] * self.heads * (outer + core + 2 * keys * value_dim * taps)
