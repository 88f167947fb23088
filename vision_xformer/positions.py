"""Positions of tokens on a grid of one, two or three axes: learned, sin-cos and rotary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import Tensor, nn

from .layers import TokenTable
from .layout import Layout
from .registry import unknown

POSITIONS = ("learned", "sincos", "raster_sincos", "none")
ROPE_KINDS = ("axial", "raster")


class LearnedPosition(TokenTable):
    """A learned vector for each token, prefix included: () -> (N, D)."""


class FixedTable(nn.Module):
    """A table that is computed, not learned nor saved: () -> (N, C).

    It is made again wherever the module goes, so that it has its values after ``to_empty``, and is
    computed in float32 whatever the module's type; ``follows_type`` says what it is rounded to.
    """

    table: Tensor
    follows_type: ClassVar[bool] = True

    def _make(self, device: torch.device) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTable:
        super()._apply(fn, recurse)
        if self.table.device.type != "meta":
            table = self._make(self.table.device)
            self.table = table.to(self.table.dtype) if self.follows_type else table
        return self

    def forward(self) -> Tensor:
        return self.table


class SinCosPosition(FixedTable):
    """Fixed sines and cosines of each coordinate (Beyer et al. 2022, arXiv 2205.01580): -> (N, D).

    The width is shared equally by the axes, the last one first: its sines, then its cosines, of
    frequencies from 1 to 1/10000. What does not divide, and the prefix, is zero.
    """

    def __init__(self, layout: Layout, dim: int) -> None:
        super().__init__()
        axes = len(layout.grid)
        pairs = dim // (2 * axes)
        if pairs == 0:
            raise ValueError(f"dim {dim} must be at least {2 * axes} for sin-cos on {axes} axes")
        self.layout, self.dim, self.pairs = layout, dim, pairs
        table = self._make(torch.get_default_device()).to(torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def _make(self, device: torch.device) -> Tensor:
        layout, dim, pairs = self.layout, self.dim, self.pairs
        with torch.device(device):
            powers = torch.arange(pairs, dtype=torch.float32) / max(1, pairs - 1)
            frequency = 1 / 10000.0**powers
            table = torch.zeros(layout.length, dim, dtype=torch.float32)
            coordinates = torch.meshgrid(*(torch.arange(g) for g in layout.grid), indexing="ij")
        for axis, coordinate in enumerate(reversed(coordinates)):
            angle = coordinate.flatten()[:, None] * frequency
            start = axis * 2 * pairs
            table[layout.prefix :, start : start + 2 * pairs] = torch.cat(
                (angle.sin(), angle.cos()), 1
            )
        return table


class RasterSinCosPosition(SinCosPosition):
    """Sines and cosines of the place in the row-major sequence, prefix included: () -> (N, D).

    Sines on even channels and cosines on odd ones (Vaswani et al. 2017, 3.5), as in CCT.
    """

    def _make(self, device: torch.device) -> Tensor:
        places = torch.arange(self.layout.length, dtype=torch.float32, device=device)
        channels = torch.arange(self.dim, device=device)
        angle = places[:, None] / 10000.0 ** ((channels // 2 * 2).float() / self.dim)
        return torch.where(channels % 2 == 0, angle.sin(), angle.cos())


class _Offsets(FixedTable):
    """Row-major index of the place of each query as seen from each key: () -> (N * M,).

    That is the distance on each axis, 0 to g - 1, or with ``signed`` 1 - g to g - 1, from 0 on.
    """

    def __init__(self, layout: Layout, stride: int = 1, signed: bool = False) -> None:
        super().__init__()
        self.layout, self.stride, self.signed = layout, stride, signed
        self.register_buffer("table", self._make(torch.get_default_device()), persistent=False)

    def _make(self, device: torch.device) -> Tensor:
        index = torch.zeros((), dtype=torch.long, device=device)
        places = [torch.arange(size, device=device) for size in self.layout.grid]
        queries = torch.cartesian_prod(*(p[:: self.stride] for p in places)).view(-1, len(places))
        keys = torch.cartesian_prod(*places).view(-1, len(places))
        for axis, size in enumerate(self.layout.grid):
            offset = queries[:, None, axis] - keys[:, axis]
            if self.signed:
                index = index * (2 * size - 1) + offset + size - 1
            else:
                index = index * size + offset.abs()
        return index.flatten().int()


class PositionBias(TokenTable):
    """A learned number for each head and distance (LeViT, Graham et al. 2021, eq. 1): -> (H, N, M).

    The distance of a query and a key is that along each axis. Starts as zero.

    Args:
        layout: of the M keys; it has no prefix.
        heads: number of heads H.
        stride: the N queries are those of ``layout.strided(stride)``.
    """

    def __init__(self, layout: Layout, heads: int, stride: int = 1) -> None:
        if layout.prefix:
            raise ValueError(
                f"a position bias has no place for the {layout.prefix} prefix token(s)"
            )
        super().__init__(layout, heads, std=0.0)
        self.shape = (layout.strided(stride).length, layout.length)
        self.offsets = _Offsets(layout, stride)

    def forward(self) -> Tensor:
        return _bias_map(self.grid.flatten(0, -2), self.offsets(), self.shape)


class RelativeBias(nn.Module):
    """A learned number for each head and offset (Swin, Liu et al. 2021, eq. 4): -> (H, N, N).

    Offsets are signed. Starts as zero.

    Args:
        grid: of the N tokens.
        heads: number of heads H.
    """

    def __init__(self, grid: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.length = math.prod(grid)
        self.table = TokenTable(Layout(tuple(2 * g - 1 for g in grid)), heads, std=0.0)
        self.offsets = _Offsets(Layout(grid), signed=True)

    def forward(self) -> Tensor:
        return _bias_map(self.table(), self.offsets(), (self.length, self.length))


class DynamicBias(nn.Module):
    """A number for each head and offset, of a small network (CrossFormer, Wang et al. 2021, section
    3.3): () -> (H, N, N).

    Args:
        grid: of the N tokens.
        heads: number of heads H.
        hidden_dim: width of the network.
    """

    def __init__(self, grid: tuple[int, ...], heads: int, hidden_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(len(grid), hidden_dim)]
        for width in (hidden_dim, hidden_dim, heads):
            layers += [nn.LayerNorm(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, width)]
        self.layers = nn.Sequential(*layers)
        self.grid, self.length = grid, math.prod(grid)
        self.offsets = _Offsets(Layout(grid), signed=True)

    def forward(self) -> Tensor:
        like = next(self.parameters())
        places = [torch.arange(1 - g, g, device=like.device, dtype=like.dtype) for g in self.grid]
        rows = self.layers(torch.cartesian_prod(*places).view(-1, len(places)))
        return _bias_map(rows, self.offsets(), (self.length, self.length))


def _bias_map(rows: Tensor, offsets: Tensor, shape: tuple[int, int]) -> Tensor:
    """A row of H numbers for each offset, (P, H), as (H, N, M)."""
    return rows.mT.index_select(1, offsets).unflatten(1, shape)


class RotaryPosition(FixedTable):
    """Angles of rotary position embedding (Su et al. 2021, arXiv 2104.09864): () -> (N, A).

    Args:
        layout: the tokens; prefix tokens get angle 0.
        head_dim: width K per head; the first A <= K channels are rotated, in pairs.
        kind: "axial" gives each axis an equal share of the pairs, base 100 as for pictures (Heo et
            al. 2024, arXiv 2403.13298); "raster" is the form of the X-formers paper: the place in
            the row-major sequence, base 10000.

    Angles are float32 in a module of any type: in half precision a position of 1000 is off by
    several radians.
    """

    follows_type = False

    def __init__(self, layout: Layout, head_dim: int, kind: str) -> None:
        super().__init__()
        if kind not in ROPE_KINDS:
            raise unknown("rope", kind, ROPE_KINDS)
        axes = len(layout.grid) if kind == "axial" else 1
        if head_dim < 2 * axes:
            raise ValueError(
                f"head_dim {head_dim} must be at least {2 * axes} for rope={kind!r} on {axes} axes"
            )
        self.layout, self.kind = layout, kind
        self.axis_dim = head_dim // (2 * axes) * 2
        self.register_buffer("table", self._make(torch.get_default_device()), persistent=False)

    def _make(self, device: torch.device) -> Tensor:
        grid, prefix = self.layout
        axial = self.kind == "axial"
        lines = [range(g) for g in grid] if axial else [range(prefix, self.layout.length)]
        with torch.device(device):
            places = torch.meshgrid(*(torch.tensor(line) for line in lines), indexing="ij")
            # it cannot be built for a width of 2; that of 4 begins with the same frequency, 1
            rotary = RotaryEmbedding(
                max(4, self.axis_dim), theta=100 if axial else 10000, cache_if_possible=False
            )
            angles = [rotary(place.flatten())[:, : self.axis_dim] for place in places]
            table = torch.cat(angles, 1).detach()
        return torch.cat((table.new_zeros(prefix, table.shape[1]), table))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels: x (B, N, H, K), angles (N, A) -> (B, N, H, K)."""
    rotated: Tensor = apply_rotary_emb(angles[:, None], x)
    return rotated


def make_position(kind: str, layout: Layout, dim: int, std: float) -> nn.Module | None:
    """The table to add to the tokens for a ``kind`` of POSITIONS; "learned" starts from ``std``."""
    if kind == "none":
        return None
    if kind == "learned":
        return LearnedPosition(layout, dim, std)
    if kind == "sincos":
        return SinCosPosition(layout, dim)
    if kind == "raster_sincos":
        return RasterSinCosPosition(layout, dim)
    raise unknown("position", kind, POSITIONS)
