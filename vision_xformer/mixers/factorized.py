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
from ..kernels import ValuePath, merge_heads, split_heads
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
        y = self.mixer(self._fold(x, grid), *self._inner(grid, rope))
        return self._unfold(y, grid)

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its values, see :class:`Mixer`.

        Raises:
            ValueError: for a mixer that attends to a learned memory, or is not linear in values.
        """
        self.check(x, grid, rope)
        path = self.mixer.value_path(self._fold(x, grid), *self._inner(grid, rope))
        if path.keys is None:
            name = type(self.mixer).__name__
            raise ValueError(f"{name} attends to a learned memory, not along axes of {grid}")

        def fold(y: Tensor) -> Tensor:
            return split_heads(self._fold(merge_heads(y), grid), y.shape[1])

        def unfold(y: Tensor) -> Tensor:
            return split_heads(self._unfold(merge_heads(y), grid), y.shape[1])

        return ValuePath(
            unfold(path.values),
            lambda values: unfold(path.apply(fold(values))),
            lambda y: self._unfold(path.finish(fold(y)), grid),
            grid, grid,
        )  # fmt: skip

    def _inner(self, grid: TokenGrid, rope: Tensor | None) -> tuple[TokenGrid, Tensor | None]:
        """Grid and angles of the samples of :meth:`_fold`, which have the same angles."""
        if rope is not None:
            rope = self._fold(rope[None], grid)[0]
        return subgrid(grid, self.axes), rope

    def _dims(self) -> list[int]:
        return [axis + 1 for axis in self.axes]

    def _last(self) -> list[int]:
        return list(range(-1 - len(self.axes), -1))

    def _fold(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """(B, N, C) -> (B * others, n, C), where n tokens differ on the mixed axes only."""
        cells = x[:, grid.prefix :].unflatten(1, grid.shape)
        y = cells.movedim(self._dims(), self._last()).flatten(-1 - len(self.axes), -2)
        y = y.flatten(0, -3)
        if grid.prefix:
            y = torch.cat((x[:, : grid.prefix].repeat_interleave(self._others(grid), 0), y), 1)
        return y

    def _unfold(self, y: Tensor, grid: TokenGrid) -> Tensor:
        """Undo :meth:`_fold`: (B * others, n, C) -> (B, N, C), with the mean of prefix tokens."""
        prefix, inner = grid.prefix, subgrid(grid, self.axes).shape
        others = [size for axis, size in enumerate(grid.shape) if axis not in self.axes]
        mixed = y[:, prefix:].reshape(-1, *others, *inner, y.shape[-1])
        mixed = mixed.movedim(self._last(), self._dims()).flatten(1, -2)
        if not prefix:
            return mixed
        means = y[:, :prefix].unflatten(0, (-1, self._others(grid))).mean(1)
        return torch.cat((means, mixed), 1)

    def _others(self, grid: TokenGrid) -> int:
        """Number of samples that :meth:`_fold` makes of one."""
        return math.prod(size for axis, size in enumerate(grid.shape) if axis not in self.axes)


def subgrid(grid: TokenGrid, axes: tuple[int, ...]) -> TokenGrid:
    """The grid of the tokens that differ on those axes only."""
    return TokenGrid(tuple(grid.shape[axis] for axis in axes), grid.prefix)


def space_time(
    make: Callable[[TokenGrid], Mixer], grid: TokenGrid, dynamic: bool = False
) -> list[Mixer]:
    """A mixer within each frame of a (T, H, W) grid, then one over time if T is above 1.

    Raises:
        ValueError: for a grid without time, or with T = 1 if T may change (``dynamic``).
    """
    if len(grid.shape) != 3:
        raise ValueError(
            f"factorized=True needs frames, height and width, not a grid of {grid.shape}: "
            "input_shape must be (channels, frames, height, width)"
        )
    if dynamic and grid.shape[0] == 1:
        raise ValueError(
            f"factorized=True with dynamic_size=True and a grid of {grid.shape} would never mix "
            "over time: input_shape must have frames for at least two steps"
        )
    axes = [(1, 2)] + [(0,)] * (grid.shape[0] > 1)
    return [AxisMixer(make(subgrid(grid, some)), grid, some) for some in axes]
