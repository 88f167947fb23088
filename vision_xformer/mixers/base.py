"""The contract of token mixers: modules (B, N, D) -> (B, n, E) that own all of their parameters."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels import KERNELS, ValuePath
from ..options import check_at_least
from ..registry import Registry


class Mixer(nn.Module):
    """Map tokens (B, N, D) to (B, n, E); n = N and E = D unless a backbone asks for something else.

    Options are keyword-only constructor arguments.

    Args:
        dim: token width D.
        heads: number of heads; ``None`` exactly for mixers without them (``takes_heads = False``).
        grid: positions of the N tokens.

    Attributes:
        takes_heads: whether the mixer has heads.
        updates_prefix: whether prefix tokens are updated.
        fixed: whether parameters are sized by ``grid``, so that other grids raise a ValueError.
        weight_grid: grid whose cells rows of the weights belong to, if the shape of these weights
            does not state it.
        rope_dim: width per head of the queries and keys that RoPE rotates; None without them.
    """

    takes_heads: ClassVar[bool] = True
    updates_prefix: bool = True
    fixed: bool = False
    weight_grid: tuple[int, ...] | None = None
    rope_dim: int | None = None

    def __init__(self, dim: int, heads: int | None, grid: TokenGrid) -> None:
        super().__init__()
        self.dim, self.heads, self.grid = dim, heads, grid
        self.tokens_shape = (grid.length, dim)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix.

        Args:
            x: tokens (B, N, D).
            grid: their positions.
            rope: angles (N, A), see :class:`~vision_xformer.positions.RotaryPosition`.

        Returns:
            Tokens (B, n, E).
        """
        raise NotImplementedError

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its values, for the arguments of :meth:`forward`.

        Raises:
            ValueError: for a mixer that is not linear in values.
        """
        raise ValueError(
            f"{type(self).__name__} has no attention map: its output is not linear in values"
        )

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """The positions of the output tokens for an input grid."""
        return grid

    def check(self, x: Tensor, grid: TokenGrid, rope: Tensor | None) -> None:
        """Raise a ValueError unless tokens are (B, N, D), and grid and angles (N, A) fit."""
        name = type(self).__name__
        if x.ndim != 3 or x.shape[1:] != (grid.length, self.dim):
            raise ValueError(
                f"{name} got tokens of shape {tuple(x.shape)}; "
                f"{grid} and dim {self.dim} need (B, {grid.length}, {self.dim})"
            )
        if self.fixed and grid != self.grid:
            raise ValueError(
                f"{name} was built for {self.grid} and cannot take {grid}: build it for that; "
                "load_weights(..., resize=True) carries tables of tokens over"
            )
        if rope is not None and self.rope_dim is None:
            raise ValueError(f"{name} does not take rotary positions: leave rope out")
        if rope is not None and rope.shape[0] != grid.length:
            raise ValueError(
                f"rope of shape {tuple(rope.shape)} must have a row for each of the "
                f"{grid.length} tokens of {grid}"
            )

    def check_axes(self, grid: TokenGrid) -> None:
        """Raise a ValueError for a grid whose number of axes does not fit the convolutions."""
        if len(grid.shape) != len(self.grid.shape):
            raise ValueError(
                f"{type(self).__name__} was built for a grid of {len(self.grid.shape)} axes and "
                f"cannot take {grid}"
            )


def head_width(dim: int, heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Check and return (heads, head_dim); ``head_dim`` is dim / heads where it is None."""
    if heads is None:
        raise ValueError("heads is needed")
    check_at_least("heads", heads, 1)
    if head_dim is None:
        if dim % heads:
            raise ValueError(f"heads {heads} must divide dim {dim}, or head_dim must be given")
        head_dim = dim // heads
    check_at_least("head_dim", head_dim, 1)
    return heads, head_dim


MIXERS: Registry[Mixer] = Registry("mixer", exclusive_with=KERNELS)
