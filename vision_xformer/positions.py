"""Positions of tokens on a grid of one, two or three axes: learned, sin-cos and rotary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from rotary_embedding_torch import apply_rotary_emb
from torch import Tensor, nn

from .grid import TokenGrid
from .options import unknown_name_error
from .precision import autocasts

PositionKind = Literal["learned", "sincos", "raster_sincos", "fourier", "none"]
RopeKind = Literal["axial", "raster"]
POSITIONS: tuple[PositionKind, ...] = get_args(PositionKind)
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)


class TokenTable(nn.Module):
    """Learned per-token table that stores its grid shape. Shape: () -> (N, C).

    The part on the grid keeps its axes, (*shape, C), so that a saved table can be resized.

    Args:
        grid: positions of the N tokens.
        dim: width C of a row.
        std: standard deviation of the initial values.
    """

    prefix: nn.Parameter | None

    def __init__(self, grid: TokenGrid, dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.randn(*grid.shape, dim) * std)
        prefix = nn.Parameter(torch.randn(grid.prefix, dim) * std) if grid.prefix else None
        self.register_parameter("prefix", prefix)

    def extra_repr(self) -> str:
        """The sizes that ``print`` shows."""
        *shape, dim = self.grid.shape
        return f"grid={tuple(shape)}, dim={dim}"

    def forward(self) -> Tensor:
        """The table (N, C)."""
        return self._with_prefix(self.grid)

    def _with_prefix(self, cells: Tensor) -> Tensor:
        rows = cells.flatten(0, -2)
        return rows if self.prefix is None else torch.cat((self.prefix, rows))


def resize_grid(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Interpolate a table over a grid: bicubic on images, else linear along each axis.

    Shape: (*old, C) -> (*shape, C)

    Raises:
        ValueError: for a shape of another number of axes.
    """
    old = tuple(table.shape[:-1])
    if len(shape) != len(old):
        raise ValueError(f"a table over the grid {old} cannot be resized to the grid {shape}")
    x = table.to(torch.promote_types(table.dtype, torch.float32)).movedim(-1, 0)[None]
    if len(shape) == 2:
        x = F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False)
    else:  # one axis after another: only the two-dimensional modes support antialiasing
        for axis, size in enumerate(shape, start=2):
            lines = x.movedim(axis, -1)
            flat = lines.reshape(1, 1, -1, lines.shape[-1])
            flat = F.interpolate(flat, (flat.shape[2], size), mode="bilinear", antialias=True)
            x = flat.view(*lines.shape[:-1], size).movedim(-1, axis)
    return x[0].movedim(0, -1).to(table.dtype)


class LearnedPosition(TokenTable):
    """A learned vector for each token, including the prefix. Shape: () -> (N, D)."""

    def forward(self, like: Tensor | None = None, grid: TokenGrid | None = None) -> Tensor:
        """Return the table (N, D), interpolated for another grid.

        ``like`` is accepted for compatibility with GridTable.
        """
        if grid is None or grid.shape == tuple(self.grid.shape[:-1]):
            return super().forward()
        return self._with_prefix(resize_grid(self.grid, grid.shape))


class FixedTable(nn.Module):
    """A computed, non-persistent table. Shape: () -> (N, C).

    It is computed in float32; with ``follows_type`` it is then cast to the dtype of the module. It
    is recomputed whenever the device or dtype of the module changes, and if a call passes a tensor
    on another device. The latter happens if the module was built on the meta device and filled by
    ``load_state_dict(..., assign=True)`` or by tools that replace parameters.
    """

    table: Tensor
    follows_type: ClassVar[bool] = True

    def _make(self, device: torch.device) -> Tensor:
        raise NotImplementedError

    def _remake(self, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be used in training
            table = self._make(device)
        self.table = table.to(dtype) if self.follows_type else table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTable:
        super()._apply(fn, recurse)
        if self.table.device.type != "meta":
            self._remake(self.table.device, self.table.dtype)
        return self

    def forward(self, like: Tensor | None = None) -> Tensor:
        """Return the table (N, C), on the device of ``like``, the tensor that it is used with."""
        if like is None:
            return self.table
        # under autocast the dtype of a tensor is not that of the module
        keeps = not self.follows_type or autocasts(like)
        dtype = self.table.dtype if keeps else like.dtype
        if self.table.device != like.device or self.table.dtype != dtype:
            self._remake(like.device, dtype)
        return self.table


class GridTable(FixedTable):
    """A computed table with a row for each token, on any grid. Shape: () -> (N, C)."""

    tokens: TokenGrid

    def rows(self, grid: TokenGrid, device: torch.device) -> Tensor:
        """Compute the table of a grid: (N, C)."""
        raise NotImplementedError

    def _make(self, device: torch.device) -> Tensor:
        return self.rows(self.tokens, device)

    def forward(self, like: Tensor | None = None, grid: TokenGrid | None = None) -> Tensor:
        """Return the table (N, C) of ``grid``, on the device of ``like``."""
        table = super().forward(like)
        if grid is None or grid == self.tokens:
            return table
        return self.rows(grid, table.device).to(table.dtype)


class SinCosPosition(GridTable):
    """Fixed sines and cosines of each coordinate (Beyer et al. 2022, arXiv 2205.01580).

    Each axis gets an equal share of the width, the last axis first: its sines, then its cosines, at
    frequencies from 1 to 1/10000. Remaining channels and the rows of prefix tokens are zero.

    Shape: () -> (N, D)

    Args:
        grid: positions of the N tokens.
        dim: width D.

    Raises:
        ValueError: for a width without a pair of channels for each axis.
    """

    def __init__(self, grid: TokenGrid, dim: int) -> None:
        super().__init__()
        axes = len(grid.shape)
        pairs = dim // (2 * axes)
        if pairs == 0:
            raise ValueError(f"dim {dim} must be at least {2 * axes} for sin-cos on {axes} axes")
        self.tokens, self.dim, self.pairs = grid, dim, pairs
        table = self._make(torch.get_default_device()).to(torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def rows(self, grid: TokenGrid, device: torch.device) -> Tensor:
        """Compute the table of a grid: (N, D)."""
        dim, pairs = self.dim, self.pairs
        with torch.device(device):
            powers = torch.arange(pairs, dtype=torch.float32) / max(1, pairs - 1)
            frequency = 1 / 10000.0**powers
            table = torch.zeros(grid.length, dim, dtype=torch.float32)
            coordinates = torch.meshgrid(*(torch.arange(g) for g in grid.shape), indexing="ij")
        for axis, coordinate in enumerate(reversed(coordinates)):
            angle = coordinate.flatten()[:, None] * frequency
            start = axis * 2 * pairs
            table[grid.prefix :, start : start + 2 * pairs] = torch.cat(
                (angle.sin(), angle.cos()), 1
            )
        return table


class FourierFeatures(SinCosPosition):
    """Sines and cosines at 16 wavelengths, the shortest of which is the length of the axis.

    Coordinates start at 1 and are divided by the length. There are 32 channels for each axis in
    turn; even ones are sines, odd ones cosines (El-Nouby et al. 2021, arXiv 2106.09681).

    Shape: () -> (N, 32 A) on A axes

    Args:
        grid: positions of the N tokens.
    """

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__(grid, 32 * len(grid.shape))

    def rows(self, grid: TokenGrid, device: torch.device) -> Tensor:
        """Compute the features of a grid: (N, 32 A)."""
        channels = torch.arange(32, device=device)
        wavelengths = 10000.0 ** ((channels // 2 * 2).float() / 32)
        features = []
        for axis, size in enumerate(grid.shape):
            position = torch.arange(1, size + 1, dtype=torch.float32, device=device)
            angle = (position / (position[-1:] + 1e-6) * (2 * math.pi))[:, None] / wavelengths
            waves = torch.where(channels % 2 == 0, angle.sin(), angle.cos())
            shape = [1] * len(grid.shape) + [32]
            shape[axis] = size
            features.append(waves.view(shape).expand(*grid.shape, 32))
        rows = torch.cat(features, -1).flatten(0, -2)
        return torch.cat((rows.new_zeros(grid.prefix, self.dim), rows))


class FourierPosition(nn.Module):
    """A learned projection of :class:`FourierFeatures`; rows of prefix tokens are zero.

    Shape: () -> (N, D)

    Args:
        grid: positions of the N tokens.
        dim: width D.
    """

    def __init__(self, grid: TokenGrid, dim: int) -> None:
        super().__init__()
        self.tokens, self.features = grid, FourierFeatures(grid)
        self.proj = nn.Linear(self.features.dim, dim)

    def forward(self, like: Tensor | None = None, grid: TokenGrid | None = None) -> Tensor:
        """Return the table (N, D) of ``grid``, on the device of ``like``."""
        rows, prefix = self.proj(self.features(like, grid)), self.tokens.prefix
        if not prefix:
            return rows
        return torch.cat((torch.zeros_like(rows[:prefix]), rows[prefix:]))


class RasterSinCosPosition(SinCosPosition):
    """Sines and cosines of the position in the row-major sequence, which includes the prefix.

    Even channels are sines and odd ones cosines (Vaswani et al. 2017, section 3.5), as in CCT.

    Shape: () -> (N, D)
    """

    def rows(self, grid: TokenGrid, device: torch.device) -> Tensor:
        """Compute the table of a grid: (N, D)."""
        positions = torch.arange(grid.length, dtype=torch.float32, device=device)
        channels = torch.arange(self.dim, device=device)
        angle = positions[:, None] / 10000.0 ** ((channels // 2 * 2).float() / self.dim)
        return torch.where(channels % 2 == 0, angle.sin(), angle.cos())


class RotaryPosition(GridTable):
    """Angles of rotary position embedding (Su et al. 2021, arXiv 2104.09864), in radians.

    Angles are float32 whatever the dtype of the module: in bfloat16 an angle near 1000 would be
    off by up to 2 radians.

    Shape: () -> (N, A)

    Args:
        grid: positions of the N tokens; prefix tokens get angle 0.
        head_dim: width K per head; the first A <= K channels are rotated, in pairs.
        kind: "axial" gives each axis an equal share of the pairs, with base 100 as usual for images
            (Heo et al. 2024, arXiv 2403.13298); "raster" is the form of the X-formers paper: the
            position in the row-major sequence, with base 10000.

    Raises:
        ValueError: for an unknown kind, or a width without a pair of channels for each axis.
    """

    follows_type = False

    def __init__(self, grid: TokenGrid, head_dim: int, kind: str) -> None:
        super().__init__()
        if kind not in ROPE_KINDS:
            raise unknown_name_error("rope", kind, ROPE_KINDS)
        axes = len(grid.shape) if kind == "axial" else 1
        if head_dim < 2 * axes:
            raise ValueError(
                f"head_dim {head_dim} must be at least {2 * axes} for rope={kind!r} on {axes} axes"
            )
        self.tokens, self.kind = grid, kind
        self.axis_dim = head_dim // (2 * axes) * 2
        self.register_buffer("table", self._make(torch.get_default_device()), persistent=False)

    def rows(self, grid: TokenGrid, device: torch.device) -> Tensor:
        """Compute the angles on a grid: (N, A)."""
        shape, prefix = grid
        axial = self.kind == "axial"
        lines = [range(g) for g in shape] if axial else [range(prefix, grid.length)]
        with torch.device(device):
            coordinates = torch.meshgrid(*map(torch.tensor, lines), indexing="ij")
            # RotaryEmbedding has a parameter, which accelerate's init_empty_weights moves to meta
            powers = torch.arange(0, self.axis_dim, 2).float() / self.axis_dim
            frequencies = 1.0 / (100 if axial else 10000) ** powers
            angles = [
                torch.outer(c.flatten().float(), frequencies).repeat_interleave(2, 1)
                for c in coordinates
            ]
            table = torch.cat(angles, 1)
        return torch.cat((table.new_zeros(prefix, table.shape[1]), table))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels: x (B, N, H, K), angles (N, A) -> (B, N, H, K)."""
    return apply_rotary_emb(angles[:, None], x)


def make_position(
    kind: str, grid: TokenGrid, dim: int, std: float
) -> LearnedPosition | SinCosPosition | FourierPosition | None:
    """The table of a ``kind`` of POSITIONS that is added to the tokens, () -> (N, D), or None.

    ``std`` is the initial standard deviation of a learned table.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "none":
        return None
    if kind == "learned":
        return LearnedPosition(grid, dim, std)
    if kind == "sincos":
        return SinCosPosition(grid, dim)
    if kind == "raster_sincos":
        return RasterSinCosPosition(grid, dim)
    if kind == "fourier":
        return FourierPosition(grid, dim)
    raise unknown_name_error("position", kind, POSITIONS)
