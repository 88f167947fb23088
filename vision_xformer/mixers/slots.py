"""What a backbone asks of the mixers in its blocks; what the mixers' options choose is the user's.

Attention asks its slot for the maps around its kernel. A mixer without queries and keys is put into
an adapter that does beside it what the backbone does around its attention.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..kernels import Kernel
from ..layers import ConvNorm, LinearNorm
from ..layout import Layout, take_strided
from ..positions import PositionBias
from ..projections import (
    ClassProjection,
    ConvProjection,
    LinearProjection,
    NormProjection,
    Projection,
    on_grid,
)
from ..registry import check_at_least, check_odd, check_types
from .base import Mixer


@dataclasses.dataclass(frozen=True)
class Slot:
    """ViT's: linear maps to q, k, v and from the heads, nothing else."""

    stride = 1  # queries, and what comes out, are taken at every such place of the grid
    kv_stride = 1  # so are keys and values

    def value_dim(self, key_dim: int) -> int:
        """Value width V per head for a key width K."""
        return key_dim

    def projection(
        self, dim: int, widths: tuple[int, ...], bias: bool, layout: Layout, heads: int
    ) -> Projection:
        return LinearProjection(dim, widths, bias)

    def output(self, width: int, dim: int) -> nn.Module:
        """The map behind the heads or the adapted mixer, (B, n, width) -> (B, n, E)."""
        return nn.Linear(width, dim)

    def bias(self, layout: Layout, heads: int) -> nn.Module | None:
        """() -> (H, N, M), added to the logits."""
        return None

    @property
    def bias_fixes_layout(self) -> bool:
        """Whether there is one, of the size of the layout."""
        return False

    def adapt(self, mixer: Mixer) -> Mixer:
        """A mixer without queries and keys, made to fit."""
        return mixer

    def queries(self, layout: Layout) -> Layout:
        """Where the queries lie, and what comes out."""
        return layout.strided(self.stride)

    def take_queries(self, x: Tensor, layout: Layout) -> Tensor:
        """The tokens of :meth:`queries`."""
        return take_strided(x, layout, self.stride)

    def kernel_layout(self, layout: Layout) -> Layout:
        """Where the keys lie that a kernel sees at once."""
        return layout.strided(self.kv_stride)

    def wrap(self, kernel: Kernel, name: str, layout: Layout) -> nn.Module:
        """The kernel of that name, made to fit."""
        return kernel


@dataclasses.dataclass(frozen=True)
class ConvSlot(Slot):
    """CvT's: depth-wise convolutions with batch norm in front.

    Args:
        kernel: their width, odd.
        kv_stride: of keys and values.
    """

    kernel: int = 3
    kv_stride: int = 2

    def __post_init__(self) -> None:
        check_types(vars(self), type(self))
        check_odd("kernel", self.kernel)
        check_at_least("kv_stride", self.kv_stride, 1)
        if self.kv_stride > self.kernel:
            raise ValueError(
                f"kv_stride {self.kv_stride} must be at most kernel {self.kernel}: some tokens "
                "would never be read"
            )

    def projection(
        self, dim: int, widths: tuple[int, ...], bias: bool, layout: Layout, heads: int
    ) -> Projection:
        return ConvProjection(dim, widths, bias, layout, heads, self.kernel, self.kv_stride)

    def adapt(self, mixer: Mixer) -> Mixer:
        conv = ConvNorm(len(mixer.layout.grid), mixer.dim, mixer.dim, self.kernel, groups=mixer.dim)
        return Adapter(mixer, conv, 1, nn.Identity())


@dataclasses.dataclass(frozen=True)
class NormSlot(Slot):
    """LeViT's: batch norm behind each map, hard-swish before the last, a bias for each distance.

    Args:
        value_ratio: value width for a key width of 1.
        position_bias: whether the logits get one.
        stride: with 2 the attention shrinks the grid.
        out_dim: width E that comes out; D by default. Where neither it nor the stride changes
            anything, the mixer is a residual branch and starts as nothing.
    """

    value_ratio: int = 2
    position_bias: bool = True
    stride: int = 1
    out_dim: int | None = None

    def __post_init__(self) -> None:
        check_types(vars(self), type(self))
        check_at_least("value_ratio", self.value_ratio, 1)
        if self.stride not in (1, 2):
            raise ValueError(f"stride {self.stride} must be 1, or 2 to shrink the grid")
        if self.out_dim is not None:
            check_at_least("out_dim", self.out_dim, 1)

    def value_dim(self, key_dim: int) -> int:
        return self.value_ratio * key_dim

    def projection(
        self, dim: int, widths: tuple[int, ...], bias: bool, layout: Layout, heads: int
    ) -> Projection:
        if bias:
            raise ValueError("qkv_bias=True has no effect before a batch norm: leave it out")
        return NormProjection(dim, widths, self.stride)

    def output(self, width: int, dim: int) -> nn.Module:
        branch = self.stride == 1 and self.out_dim is None
        out_dim = self.out_dim or dim
        return nn.Sequential(nn.Hardswish(), LinearNorm(width, out_dim, 0.0 if branch else 1.0))

    def bias(self, layout: Layout, heads: int) -> PositionBias | None:
        return PositionBias(layout, heads, self.stride) if self.position_bias else None

    @property
    def bias_fixes_layout(self) -> bool:
        return self.position_bias

    def adapt(self, mixer: Mixer) -> Mixer:
        if self.position_bias:
            raise ValueError(
                f"{type(mixer).__name__} has no attention map: position_bias must be False"
            )
        return Adapter(mixer, None, self.stride, self.output(mixer.dim, mixer.dim))


@dataclasses.dataclass(frozen=True)
class ClassSlot(Slot):
    """CaiT's and CrossViT's: the first token alone asks, (B, N, D) -> (B, 1, D)."""

    def projection(
        self, dim: int, widths: tuple[int, ...], bias: bool, layout: Layout, heads: int
    ) -> Projection:
        return ClassProjection(dim, widths, bias)

    def adapt(self, mixer: Mixer) -> Mixer:
        raise ValueError(f"{type(mixer).__name__} has no query that a class token could ask")

    def queries(self, layout: Layout) -> Layout:
        return Layout((0,) * len(layout.grid), 1)

    def take_queries(self, x: Tensor, layout: Layout) -> Tensor:
        return x[:, :1]

    def wrap(self, kernel: Kernel, name: str, layout: Layout) -> nn.Module:
        if not kernel.takes_one_query:
            raise ValueError(
                f"mixer {name!r} pools its queries: it cannot be the class attention, where one "
                "token asks"
            )
        return kernel


class Adapter(Mixer):
    """A convolution, a mixer without queries and keys, a stride and a map, one after the other."""

    def __init__(self, mixer: Mixer, conv: nn.Module | None, stride: int, proj: nn.Module) -> None:
        super().__init__(mixer.dim, mixer.heads, mixer.layout)
        self.fixed_layout, self.reaches_prefix = mixer.fixed_layout, mixer.reaches_prefix
        self.conv, self.mixer, self.stride, self.proj = conv, mixer, stride, proj

    def out_layout(self, layout: Layout) -> Layout:
        return layout.strided(self.stride)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        if self.conv is not None:
            x = on_grid(self.conv, x, layout)
        y: Tensor = self.proj(take_strided(self.mixer(x, layout), layout, self.stride))
        return y
