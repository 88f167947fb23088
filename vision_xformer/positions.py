"""Positions of tokens on a grid of one, two or three axes: learned, sin-cos and rotary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import Tensor, nn

from .layers import TokenTable
from .layout import Layout
from .registry import unknown

ROPE_KINDS = ("axial", "raster")


class LearnedPosition(TokenTable):
    """A learned vector for each token, prefix included: () -> (N, D)."""


class SinCosPosition(nn.Module):
    """Fixed sines and cosines of each coordinate (Vaswani et al. 2017, 3.5): () -> (N, D).

    The width is shared equally by the axes; what does not divide, and the prefix, is zero.
    """

    table: Tensor

    def __init__(self, layout: Layout, dim: int) -> None:
        super().__init__()
        axes = len(layout.grid)
        pairs = dim // (2 * axes)
        if pairs == 0:
            raise ValueError(f"dim {dim} must be at least {2 * axes} for sin-cos on {axes} axes")
        frequency = 10000.0 ** (-torch.arange(pairs) / pairs)
        table = torch.zeros(layout.length, dim)
        coordinates = torch.meshgrid(*(torch.arange(g) for g in layout.grid), indexing="ij")
        for axis, coordinate in enumerate(coordinates):
            angle = coordinate.flatten()[:, None] * frequency
            start = axis * 2 * pairs
            table[layout.prefix :, start : start + 2 * pairs] = torch.cat(
                (angle.sin(), angle.cos()), 1
            )
        self.register_buffer("table", table, persistent=False)

    def forward(self) -> Tensor:
        return self.table


class RotaryPosition(nn.Module):
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

    angles: Tensor

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
        self.register_buffer("angles", self._make(torch.device("cpu")), persistent=False)

    def _make(self, device: torch.device) -> Tensor:
        grid, prefix = self.layout
        base = 100 if self.kind == "axial" else 10000
        with torch.device(device):
            rotary = RotaryEmbedding(self.axis_dim, theta=base, cache_if_possible=False)
            if self.kind == "axial":
                angles = rotary.get_axial_freqs(*grid).flatten(0, -2)
            else:
                angles = rotary(torch.arange(prefix, self.layout.length))
            return torch.cat((torch.zeros(prefix, angles.shape[-1]), angles)).detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPosition:
        super()._apply(fn, recurse)
        if self.angles.dtype != torch.float32:  # .half() and the like: made again, not rounded
            self.angles = self._make(self.angles.device)
        return self

    def forward(self) -> Tensor:
        return self.angles


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels: x (B, N, H, K), angles (N, A) -> (B, N, H, K)."""
    rotated: Tensor = apply_rotary_emb(angles[:, None], x)
    return rotated


def make_position(kind: str, layout: Layout, dim: int) -> nn.Module | None:
    """The table to add to the tokens for ``kind`` "learned", "sincos" or "none"."""
    kinds: dict[str, Any] = {"learned": LearnedPosition, "sincos": SinCosPosition}
    if kind == "none":
        return None
    if kind not in kinds:
        raise unknown("position", kind, [*kinds, "none"])
    module: nn.Module = kinds[kind](layout, dim)
    return module
