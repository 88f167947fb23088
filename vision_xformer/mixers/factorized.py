"""A mixer along some axes of the grid only: factorized space-time mixing.

Arnab et al. 2021 (ViViT, arXiv 2103.15691, section 3.3) and Bertasius et al. 2021 (arXiv
2102.05095) factorize attention for video.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..grid import TokenGrid
from .base import Mixer


class AxisMixer(Mixer):
    """Mix along some axes; all other axes are folded into the batch.

    Each sample of that batch gets a copy of the prefix tokens, and their outputs are averaged.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        mixer: built for the grid of :func:`subgrid`.
        grid: positions of all tokens.
        axes: axes of the grid that are mixed.
    """

    def __init__(self, mixer: Mixer, grid: TokenGrid, axes: tuple[int, ...]) -> None:
        super().__init__(mixer.dim, mixer.heads, grid)
        self.mixer, self.axes = mixer, axes
        self.fixed, self.rope_dim = mixer.fixed, mixer.rope_dim
        self.updates_prefix = mixer.updates_prefix

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, N, D)."""
        self.check(x, grid, rope)
        inner, prefix = subgrid(grid, self.axes), grid.prefix
        y = self._fold(x, grid)
        others, cells = y.shape[1:-2], y.shape[-2:]
        y = y.flatten(0, -3)
        count = math.prod(others)
        if prefix:
            y = torch.cat((x[:, :prefix].repeat_interleave(count, 0), y), 1)
        if rope is not None:  # all samples have the same angles, up to those of the folded axes
            rope = torch.cat((rope[:prefix], self._fold(rope[None], grid).flatten(0, -3)[0]))
        y = self.mixer(y, inner, rope)
        mixed = y[:, prefix:].reshape(-1, *others, *inner.shape, cells[-1])
        mixed = mixed.movedim(self._last(), self._dims()).flatten(1, -2)
        if not prefix:
            return mixed
        return torch.cat((y[:, :prefix].unflatten(0, (-1, count)).mean(1), mixed), 1)

    def _dims(self) -> list[int]:
        return [axis + 1 for axis in self.axes]

    def _last(self) -> list[int]:
        return list(range(-1 - len(self.axes), -1))

    def _fold(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, N, C) -> (B, *others, n, C), where n tokens differ on the mixed axes only."""
        cells = x[:, grid.prefix :].unflatten(1, grid.shape)
        return cells.movedim(self._dims(), self._last()).flatten(-1 - len(self.axes), -2)


def subgrid(grid: TokenGrid, axes: tuple[int, ...]) -> TokenGrid:
    """The grid of the tokens that differ on those axes only."""
    return TokenGrid(tuple(grid.shape[axis] for axis in axes), grid.prefix)


def space_time(make: Callable[[TokenGrid], Mixer], grid: TokenGrid) -> list[Mixer]:
    """A mixer within each frame of a (T, H, W) grid, then one over time if T is above 1.

    Raises:
        ValueError: for a grid without time.
    """
    if len(grid.shape) != 3:
        raise ValueError(
            f"factorized=True needs frames, height and width, not a grid of {grid.shape}: "
            "input_shape must be (channels, frames, height, width)"
        )
    axes = [(1, 2)] + [(0,)] * (grid.shape[0] > 1)
    return [AxisMixer(make(subgrid(grid, some)), grid, some) for some in axes]
