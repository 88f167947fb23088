"""The grid that travels with the tokens, and the arithmetic on it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where N tokens lie: ``prefix`` class and register tokens, then a grid in row-major order.

    Args:
        grid: ``(L,)`` for signals, ``(H, W)`` for images, ``(T, H, W)`` for volumes and video.
        prefix: number of tokens in front that have no place on the grid.
    """

    grid: tuple[int, ...]
    prefix: int = 0

    @property
    def length(self) -> int:
        """Number of tokens N, prefix included."""
        return self.prefix + math.prod(self.grid)

    def strided(self, stride: int) -> Layout:
        """The layout of every ``stride``-th place on each axis, the first included."""
        if stride == 1:
            return self
        return Layout(tuple(-(-g // stride) for g in self.grid), self.prefix)


def grid_parts(grid: tuple[int, ...], count: int) -> tuple[int, ...]:
    """How many parts to cut each axis into: at most ``count`` cells in all, as square as can be.

    >>> grid_parts((32, 32), 64), grid_parts((10, 30), 64), grid_parts((7, 9), 64)
    ((8, 8), (5, 12), (7, 9))
    """
    parts = [1] * len(grid)

    def may_grow(axis: int) -> bool:
        cells = math.prod(parts) // parts[axis] * (parts[axis] + 1)
        return parts[axis] < grid[axis] and cells <= count

    while room := [axis for axis in range(len(grid)) if may_grow(axis)]:
        # not min: PyTorch 2.9 compiles none with a key
        coarsest, *_ = sorted(room, key=lambda axis: parts[axis] / grid[axis])
        parts[coarsest] += 1
    return tuple(parts)


def segment_means(size: int, parts: int, device: torch.device | None = None) -> Tensor:
    """(parts, size) matrix whose rows average the ``parts`` nearly equal runs of ``size`` cells."""
    segment = torch.arange(size, device=device) * parts // size
    member = (segment == torch.arange(parts, device=device)[:, None]).double()
    return member / member.sum(1, keepdim=True)


def pool_grid(x: Tensor, layout: Layout, parts: tuple[int, ...]) -> Tensor:
    """Means over rectangular cells of the grid, prefix left out: (B, N, C) -> (B, prod(parts), C).

    One axis after the other: the cells are rectangles, so the mean of means is their mean.
    """
    x = x[:, layout.prefix :].unflatten(1, layout.grid)
    for axis, (size, count) in enumerate(zip(layout.grid, parts, strict=True), start=1):
        if size % count == 0:
            if size > count:
                x = x.unflatten(axis, (count, size // count)).mean(axis + 1)
        else:
            means = segment_means(size, count, x.device).to(x.dtype)
            x = (means @ x.movedim(axis, -2)).movedim(-2, axis)
    return x.flatten(1, len(parts))


def take_strided(x: Tensor, layout: Layout, stride: int) -> Tensor:
    """The tokens of ``layout.strided(stride)``, prefix included: (B, N, C) -> (B, n, C)."""
    if stride == 1:
        return x
    grid = x[:, layout.prefix :].unflatten(1, layout.grid)
    places = (slice(None), *(slice(None, None, stride) for _ in layout.grid))
    kept = grid[places].flatten(1, len(layout.grid))
    return torch.cat((x[:, : layout.prefix], kept), 1) if layout.prefix else kept
