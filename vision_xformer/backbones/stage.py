"""Stages: blocks on one grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..grid import TokenGrid
from ..positions import RotaryPosition
from .checkpointing import Checkpointed


class Downsampling(nn.Module):
    """Bring tokens to a coarser grid: (B, M, C) -> (B, N, D).

    Attributes:
        stride: ratio of the old grid to the new one on each axis.
    """

    stride: tuple[int, ...]

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """Return the positions of the N tokens for those of the M tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Map tokens on ``grid``: (B, M, C) -> (B, N, D)."""
        raise NotImplementedError


class Stage(Checkpointed):
    """Blocks on one grid: (B, N, D) -> (B, N, D). It can be called alone and indexed by block.

    Args:
        blocks: modules called as ``block(x, grid, rope)``.
        grid: positions of their tokens, unless a call gives others.
        rope: rotary positions of the grid.
        downsample: brings the output of the previous stage to this grid, before the blocks.
        in_grid: positions of the tokens of the previous stage; by default ``grid``.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        grid: TokenGrid,
        rope: RotaryPosition | None = None,
        downsample: Downsampling | None = None,
        in_grid: TokenGrid | None = None,
    ) -> None:
        super().__init__()
        self.downsample, self.grid, self.rope, self.depth = downsample, grid, rope, len(blocks)
        self.in_grid = grid if in_grid is None else in_grid
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)

    def __len__(self) -> int:
        return self.depth

    def truncate(self, depth: int) -> None:
        """Remove the blocks after the first ``depth``."""
        for index in range(depth, self.depth):
            delattr(self, str(index))
        self.depth = depth

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(range(self.depth)[index]))

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(self.depth))

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """Return the grid of its tokens for that of the previous stage."""
        return grid if self.downsample is None else self.downsample.out_grid(grid)

    def _angles(self, x: Tensor, grid: TokenGrid) -> Tensor | None:
        return None if self.rope is None else self.rope(x, grid)

    def apply_block(self, index: int, x: Tensor, grid: TokenGrid) -> Tensor:
        """Apply one block to tokens on ``grid``: (B, N, D) -> (B, N, D)."""
        return self.checkpointed(self[index], x, grid, self._angles(x, grid))

    def forward(self, x: Tensor, grid: TokenGrid | None = None) -> Tensor:
        """Apply the stage to the tokens of the previous one: (B, M, C) -> (B, N, D).

        ``grid`` is that of the M tokens, by default the one it was built for.
        """
        grid = self.in_grid if grid is None else grid
        if self.downsample is not None:
            x, grid = self.checkpointed(self.downsample, x, grid), self.out_grid(grid)
        rope = self._angles(x, grid)  # once: on a grid other than its own, it computes them
        for block in self:
            x = self.checkpointed(block, x, grid, rope)
        return x
