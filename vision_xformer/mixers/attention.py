"""Attention in the slot: projection, heads, rotation, kernel, heads, output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..kernels import KERNELS
from ..layout import Layout
from ..positions import rotate
from ..projections import LinearProjection
from ..registry import check_at_least
from .base import Mixer


def head_width(dim: int, heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """(heads, head_dim), checked; ``head_dim`` is dim / heads where it is None."""
    if heads is None:
        raise ValueError("heads is needed")
    check_at_least("heads", heads, 1)
    if head_dim is None:
        if dim % heads:
            raise ValueError(f"heads {heads} must divide dim {dim}, or head_dim must be given")
        head_dim = dim // heads
    check_at_least("head_dim", head_dim, 1)
    return heads, head_dim


class Attention(Mixer):
    """Multi-head attention with any kernel of the registry.

    Args:
        kernel: name of the kernel.
        kernel_options: its options.
        head_dim: width K per head; dim / heads by default.
        qkv_bias: whether the projection adds a bias.
        proj_dropout: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        layout: Layout,
        kernel: str,
        kernel_options: Mapping[str, Any],
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, layout)
        self.heads, self.head_dim = head_width(dim, heads, head_dim)
        self.kernel = KERNELS.create(
            kernel, self.heads, self.head_dim, layout, options=kernel_options
        )
        self.takes_rope = self.kernel.takes_rope
        self.fixed_layout = self.kernel.compresses
        kv_width = self.kernel.kv_heads * self.head_dim
        widths = (self.heads * self.head_dim, kv_width) + (kv_width,) * (not self.kernel.share_kv)
        self.projection = LinearProjection(dim, widths, qkv_bias)
        self.proj = nn.Linear(widths[0], dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        if self.kernel.compresses and rope is None:
            q, k, v = self._compress_and_project(x)
        else:
            q, k, v = self.projection(x)
            if rope is not None:  # where the values are the keys, they stay as they were
                q, k = (rotate(self._heads(t), rope).flatten(2) for t in (q, k))
            if self.kernel.compresses:
                k, v = self.kernel.compress(k, v)
        operands = (self._heads(t).transpose(1, 2) for t in (q, k, v))
        y: Tensor = self.kernel(*operands, layout, layout)
        out: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, H*K) -> (B, N, H, K)"""
        return x.unflatten(-1, (-1, self.head_dim))

    def _compress_and_project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E^T (x W) as (E^T x) W: the same, for R rows of keys and values instead of N."""
        ones = x.new_ones(1, x.shape[1], 1)
        k_sum, v_sum = self.kernel.compress(ones, ones)
        xs = (x, *self.kernel.compress(x, x))
        q, k, *v = self.projection.forward_each(xs, (ones, k_sum, v_sum))
        return q, k, v[0] if v else k
