"""Attention: projection, rotation, heads, kernel, heads, output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..kernels import KERNELS
from ..layout import Layout, take_strided
from ..positions import rotate
from ..registry import check_at_least
from .base import Mixer
from .slots import Slot


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
    """Multi-head attention with any kernel of the registry, wired as its slot asks.

    Args:
        kernel: name of the kernel.
        kernel_options: its options.
        slot: of the backbone.
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
        slot: Slot,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, layout)
        self.heads, self.head_dim = head_width(dim, heads, head_dim)
        self.slot = slot
        made = KERNELS.create(
            kernel, self.heads, self.head_dim, slot.kernel_layout(layout), options=kernel_options
        )
        self.kernel: Any = slot.wrap(made, kernel, layout)  # a Kernel, or one in windows
        self.takes_rope = made.takes_rope
        value_dim = slot.value_dim(self.head_dim)
        if made.share_kv and value_dim != self.head_dim:
            raise ValueError(
                f"share_kv=True: values of width {value_dim} cannot be keys of {self.head_dim}"
            )
        key_width = made.kv_heads * self.head_dim
        values = () if made.share_kv else (made.kv_heads * value_dim,)
        widths = (self.heads * self.head_dim, key_width, *values)
        self.projection = slot.projection(dim, widths, qkv_bias, layout, self.heads)
        self.position_bias = slot.bias(layout, self.heads)
        if self.position_bias is not None and not made.takes_bias:
            raise ValueError(
                f"mixer {kernel!r} forms no attention map to add a bias to: position_bias must be "
                "False"
            )
        self.fixed_layout = made.compresses or slot.bias_fixes_layout
        self.proj = slot.output(self.heads * value_dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def out_layout(self, layout: Layout) -> Layout:
        return self.slot.queries(layout)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        q_layout, k_layout = self.slot.queries(layout), layout.strided(self.slot.kv_stride)
        if self.kernel.compresses and self.projection.ends_linear and rope is None:
            q, k, v = self._compress_and_project(x, layout)
        else:
            q, k, v = self.projection(x, layout)
            if rope is not None:  # where the values are the keys, they stay as they were
                q = self._rotated(q, self.slot.take_queries(rope[None], layout)[0])
                k = self._rotated(k, take_strided(rope[None], layout, self.slot.kv_stride)[0])
            if self.kernel.compresses:
                k, v = self.kernel.compress(k, v)
        heads, kv_heads = self.heads, self.kernel.kv_heads
        operands = (
            t.unflatten(-1, (h, -1)).transpose(1, 2)
            for t, h in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
        bias = () if self.position_bias is None else (self.position_bias(),)
        y: Tensor = self.kernel(*operands, q_layout, k_layout, *bias)
        out: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return out

    def _rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        """(B, N, H*K) -> same"""
        return rotate(x.unflatten(-1, (-1, self.head_dim)), angles).flatten(2)

    def _compress_and_project(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """E^T (x W) as (E^T x) W: the same, for R rows of keys and values instead of M."""
        xq, xk, xv = self.projection.inputs(x, layout)
        ones = x.new_ones(1, xk.shape[1], 1)
        sums = (ones[:, :1], *self.kernel.compress(ones, ones))
        q, k, v = self.projection.forward_each((xq, *self.kernel.compress(xk, xv)), sums)
        return q, k, v
