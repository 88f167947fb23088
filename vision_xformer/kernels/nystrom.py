"""Nyströmformer (Xiong et al. 2021, arXiv 2102.03902, eq. 13-15).

With landmarks ql and kl, and all logits scaled by 1/sqrt(K):

    softmax(q kl^T) pinv(softmax(ql kl^T)) softmax(ql k^T) v  +  depth-wise convolution of v

The two outer maps are fused attention calls, so no N x m matrix is stored. pinv is a fixed number
of Newton-Schulz steps (eq. 14): a regularized inverse that the method relies on. The initial value
is scaled for each matrix separately, so the output for an image does not depend on its batch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forms import needs_plain, plain_second
from ..grid import TokenGrid, grid_parts
from ..options import check_at_least
from ..precision import to_accumulate, without_autocast
from .base import KERNELS, Kernel, Site, pool_heads
from .softmax import attend

_BLOCK = 32  # rows of one Toeplitz product: the smallest block for which it stays dense


def newton_schulz_pinv(a: Tensor, iterations: int) -> Tensor:
    """Approximate the pseudo-inverse by Newton-Schulz steps (eq. 14).

    Shape: (*, m, m) -> same, with at least one leading axis and rows that sum to 1
    """
    flat = a.flatten(0, -3)
    z = flat.mT * _scale(flat)
    for _ in range(iterations):
        z = _step(z, _polynomial(flat @ z))
    return z.view_as(a)


def _scale(a: Tensor) -> Tensor:
    """The factor of a^T in the initial value of each matrix, (A, m, m) -> (A, 1, 1)."""
    return (a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)).reciprocal()[:, None, None]


def _step(z: Tensor, polynomial: Tensor) -> Tensor:
    """z (13 - az (15 - az (7 - az))) / 4, (A, m, m)."""
    return torch.baddbmm(z, z, polynomial, beta=3.25, alpha=-0.25)


def _polynomial(az: Tensor) -> Tensor:
    """az (15 - az (7 - az)), (A, m, m)."""
    inner = torch.baddbmm(az, az, az, beta=-7)
    return torch.baddbmm(az, az, inner, beta=15)


class _NewtonSchulz(torch.autograd.Function):
    """All steps of :func:`newton_schulz_pinv`, which store one matrix each instead of four.

    Every x = a z is a polynomial in a a^T: it is symmetric, and the next one is
    x' = (3.375 x + 1.375^2 - s^2) / 4 with s = x^2 - 3.5 x + 1.375. So the gradient of z does not
    pass through a, only the symmetric part of the gradient of x counts, and a step of the backward
    pass takes eight products.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, scale: Tensor, iterations: int) -> Tensor:
        z = a.mT * scale
        values = []
        for _ in range(iterations):
            z = _step(z, _polynomial(a @ z))
            values.append(z)
        ctx.save_for_backward(a, scale, *values[:-1])
        ctx.iterations = iterations
        ctx.set_materialize_grads(False)  # second derivatives do not pass through here
        return z

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        if d is None:
            return None, None, None
        a, scale, *values = ctx.saved_tensors
        dx = torch.zeros_like(a)
        for z in reversed((a.mT * scale, *values)[: ctx.iterations]):
            x = a @ z
            inner = torch.baddbmm(x, x, x, beta=-7)  # x^2 - 7 x
            dp = z.mT @ d
            dp = dp + dp.mT  # -8 times the gradient of the polynomial p = x^3 - 7 x^2 + 15 x
            d = _step(d, torch.baddbmm(x, x, inner, beta=15))
            ds = torch.baddbmm(dx, inner.add_(x, alpha=3.5), dx, beta=1.375)  # s x'
            dpx = dp @ x
            square = dpx.add(ds, alpha=4)
            square = (square + square.mT).add_(dpx).add_(dp, alpha=-14)
            half = ds.baddbmm_(square, x, beta=0.875, alpha=-1 / 16)
            dx = (half + half.mT).add_(dp, alpha=-15 / 8).add_(dx, alpha=3.375 / 4)
        dz = torch.baddbmm(d, a.mT, dx)
        da = torch.baddbmm(dz.mT * scale, dx, a * scale)
        return da, (dz * a.mT).sum((-2, -1), keepdim=True), None


def depthwise_conv(v: Tensor, taps: Tensor) -> Tensor:
    """Convolve along the sequence: out[b, h, i] = sum_t taps[h, t] v[b, h, i + t - T // 2].

    Computed as dense products with the banded Toeplitz matrix, block by block: several times faster
    than a grouped convolution, whose weight gradient is also wrong on some CPUs.

    Shape: (B, H, M, V), (H, T) -> (B, H, M, V)
    """
    if v.shape[0] == 0:
        return v * taps.sum()
    taps = taps.to(v)  # outside the autocast that v comes from
    length, width = v.shape[2], taps.shape[1]
    block = max(_BLOCK, width)
    # Row i of the matrix holds the taps from column i on. A row padded to one more than the width
    # of the matrix, repeated, and read at that width is shifted by one in each row.
    band = F.pad(taps, (0, 2 * block + 1 - width)).repeat(1, block)
    band = band[:, : 2 * block * block].view(-1, block, 2 * block)
    # one product for all blocks, each with the block after it; the result that spans two samples is
    # discarded
    x, channels = _blocks(v, width // 2, block), v.shape[3]
    y = torch.baddbmm(band[..., :block] @ x[..., :-channels], band[..., block:], x[..., channels:])
    y = F.pad(y, (0, channels)).unflatten(2, (v.shape[0], -1, channels))[:, :, :, :-1]
    return y.permute(2, 0, 3, 1, 4).flatten(2, 3)[:, :, :length]


def _blocks(v: Tensor, before: int, block: int) -> Tensor:
    """Pad a sequence, and split it into blocks: (B, H, M, V) -> (H, block, B * blocks * V)."""
    blocks = -(-v.shape[2] // block) + 1
    x = F.pad(v, (0, 0, before, blocks * block - v.shape[2] - before))
    return x.unflatten(2, (blocks, block)).permute(1, 3, 0, 2, 4).flatten(2)


class _DepthwiseConv(torch.autograd.Function):
    """:func:`depthwise_conv`, which stores v but not its padded copy."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(v, taps)
        return depthwise_conv(v, taps)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        v, taps = ctx.saved_tensors
        (heads, width), channels = taps.shape, v.shape[3]
        block = max(_BLOCK, width)
        # autocast, if it is on in the forward pass, gives d a lower precision
        x, y = _blocks(v.to(d), width // 2, block), _blocks(d, 0, block)[..., :-channels]
        band = torch.cat((y @ x[..., :-channels].mT, y @ x[..., channels:].mT), -1)
        del x, y
        shifted = F.pad(band.flatten(1), (0, block)).view(heads, block, -1)  # undoes the shift
        dv = depthwise_conv(d, taps.flip(1))
        return dv.to(v), shifted[..., :width].sum(1).to(taps)


def nearest_keys(queries: TokenGrid, keys: TokenGrid, device: torch.device) -> Tensor:
    """Index (N,) of the key under each query, where one grid is a strided version of the other.

    Prefix tokens map to the prefix; where the keys have none, to the first key.
    """
    index = torch.zeros((), dtype=torch.long, device=device)
    for size, count in zip(queries.shape, keys.shape, strict=True):
        skipped, shared = -(-count // size), -(-size // count)  # one of them is 1
        position = (torch.arange(size, device=device) * skipped // shared).clamp(max=count - 1)
        index = index[..., None] * count + position
    prefix = torch.arange(queries.prefix, device=device).clamp(max=max(keys.prefix - 1, 0))
    return torch.cat((prefix, index.flatten() + keys.prefix))


def check_sizes(landmarks: int, iterations: int, residual_kernel: int) -> None:
    """Raise a ValueError for an invalid value."""
    check_at_least("landmarks", landmarks, 1)
    check_at_least("iterations", iterations, 0)
    if residual_kernel < 0 or (residual_kernel % 2 == 0 and residual_kernel != 0):
        raise ValueError(f"residual_kernel {residual_kernel} must be odd, or 0 for none")


@KERNELS.register("nystrom")
class Nystrom(Kernel):
    """Nyström approximation of softmax attention by landmarks. It works on any grid.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        landmarks: number m of landmarks; fewer where there are fewer tokens. The cost is N m + m^3.
        iterations: number of Newton-Schulz steps.
        residual_kernel: taps of the convolution of v along the sequence, odd; 0 for none.
        segments: which tokens a landmark averages: "grid", rectangular patches of the image, or
            "sequence", runs of the row-major sequence as in the paper. Along an axis the lengths
            of segments differ by at most 1, nothing is padded, and prefix tokens are excluded.

    Raises:
        ValueError: for an invalid option, or queries and keys on grids of different axes.
    """

    supports_single_query = False

    def __init__(
        self,
        site: Site,
        *,
        landmarks: int = 64,
        iterations: int = 6,
        residual_kernel: int = 33,
        segments: Literal["grid", "sequence"] = "grid",
    ) -> None:
        super().__init__(site)
        check_sizes(landmarks, iterations, residual_kernel)
        self.landmarks, self.iterations, self.segments = landmarks, iterations, segments
        self.residual = None
        if residual_kernel:
            bound = residual_kernel**-0.5
            self.residual = nn.Parameter(
                torch.empty(site.heads, residual_kernel).uniform_(-bound, bound)
            )

    @torch.no_grad()
    def start_from_softmax(self) -> None:
        """Set the convolution to zero, as softmax attention has none."""
        if self.residual is not None:
            self.residual.zero_()

    def _landmark_means(self, x: Tensor, grid: TokenGrid, parts: tuple[int, ...]) -> Tensor:
        """(B, H, N, K) -> (B, H, m, K)."""
        if self.segments == "sequence":
            grid = TokenGrid((math.prod(grid.shape),), grid.prefix)
        return pool_heads(x, grid, parts)

    def _parts(self, queries: TokenGrid, keys: TokenGrid) -> tuple[int, ...]:
        """The same parts for queries and keys, so that landmark i has one position in both."""
        if self.segments == "sequence":
            shorter = min(math.prod(queries.shape), math.prod(keys.shape))
            return (min(self.landmarks, shorter),)
        smaller = tuple(map(min, queries.shape, keys.shape))
        return grid_parts(smaller, self.landmarks)

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
        self.check_axes(queries, keys)
        parts = self._parts(queries, keys)
        q_marks = self._landmark_means(q, queries, parts)
        k_marks = self._landmark_means(k, keys, parts)
        context = attend(q_marks, k, v)
        with without_autocast(q):  # entries of the inverse are large and cancel
            ql, kl, c = to_accumulate(q_marks, k_marks, context)
            core = (ql @ kl.mT * self.site.key_dim**-0.5).softmax(-1)
            plain = partial(newton_schulz_pinv, iterations=self.iterations)
            if needs_plain(core):
                inverse = plain(core)
            else:
                flat = core.flatten(0, 1)
                inverse = _NewtonSchulz.apply(flat, _scale(flat), self.iterations).view_as(core)
                inverse = plain_second(inverse, plain, core)
            context = inverse @ c
        out = attend(q, k_marks, context.to(q.dtype))
        if self.residual is None:
            return out
        v = v.expand(-1, q.shape[1], -1, -1)  # the taps of the heads differ
        if needs_plain(v, self.residual):
            local = depthwise_conv(v, self.residual)
        else:
            local = _DepthwiseConv.apply(v, self.residual)
            local = plain_second(local, depthwise_conv, v, self.residual)
        if queries != keys:
            local = local[:, :, nearest_keys(queries, keys, v.device)]
        return out + local

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 m (N + M + m) (K + V) + 8 m^3 steps + 2 M V taps for each head."""
        landmarks = math.prod(self._parts(queries, keys))
        length, value_dim = v.shape[-2:]
        widths = q.shape[-1] + value_dim
        outer = 2 * landmarks * (q.shape[-2] + length) * widths
        core = 2 * landmarks**2 * widths + 8 * landmarks**3 * self.iterations
        taps = 0 if self.residual is None else self.residual.shape[1]
        return q.shape[0] * self.site.heads * (outer + core + 2 * length * value_dim * taps)

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"landmarks={self.landmarks}, segments={self.segments}"
