"""The grid that travels with the tokens, and the arithmetic on it.

Shape letters of the whole package: B batch, N tokens (or queries), M keys, D width, E output width,
H heads, G key and value heads, K key width per head, V value width per head, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class TokenGrid(NamedTuple):
    """The positions of N tokens: ``prefix`` tokens, then a grid in row-major order.

    Args:
        shape: ``(L,)`` for signals, ``(H, W)`` for images, ``(T, H, W)`` for volumes and video.
        prefix: number of leading tokens outside the grid, such as class and register tokens.
    """

    shape: tuple[int, ...]
    prefix: int = 0

    @property
    def length(self) -> int:
        """Number of tokens N, including the prefix."""
        return self.prefix + math.prod(self.shape)

    def strided(self, stride: int) -> TokenGrid:
        """The grid of every ``stride``-th position on each axis, starting with the first."""
        if stride == 1:
            return self
        return TokenGrid(tuple(-(-size // stride) for size in self.shape), self.prefix)


def grid_parts(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Number of parts to cut each axis into: at most ``count`` cells in all, nearly square ones.

    >>> grid_parts((32, 32), 64), grid_parts((10, 30), 64), grid_parts((7, 9), 64)
    ((8, 8), (5, 12), (7, 9))
    """
    parts = [1] * len(shape)

    def may_grow(axis: int) -> bool:
        cells = math.prod(parts) // parts[axis] * (parts[axis] + 1)
        return parts[axis] < shape[axis] and cells <= count

    while growing := [axis for axis in range(len(shape)) if may_grow(axis)]:
        # not min(): torch.compile in PyTorch 2.9 does not support its key argument
        coarsest, *_ = sorted(growing, key=lambda axis: parts[axis] / shape[axis])
        parts[coarsest] += 1
    return tuple(parts)


def segment_means(
    size: int,
    parts: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Matrix (parts, size) whose rows average ``parts`` nearly equal runs of ``size`` cells."""
    segment = torch.arange(size, device=device) * parts // size
    member = (segment == torch.arange(parts, device=device)[:, None]).to(dtype)
    return member / member.sum(1, keepdim=True)


def pool_grid(x: Tensor, grid: TokenGrid, parts: tuple[int, ...]) -> Tensor:
    """Average over rectangular cells of the grid, without the prefix.

    The cells are rectangles, so pooling one axis after another gives the mean of each cell.

    Shape: (B, N, C) -> (B, prod(parts), C)
    """
    x = x[:, grid.prefix :].unflatten(1, grid.shape)
    for axis, (size, count) in enumerate(zip(grid.shape, parts, strict=True), start=1):
        if size % count == 0:
            if size > count:
                x = x.unflatten(axis, (count, size // count)).mean(axis + 1)
        else:
            exact = torch.promote_types(x.dtype, torch.float32)  # MPS has no float64
            means = segment_means(size, count, exact, x.device).to(x.dtype)
            x = (means @ x.movedim(axis, -2)).movedim(-2, axis)
    return x.flatten(1, len(parts))


def take_strided(x: Tensor, grid: TokenGrid, stride: int) -> Tensor:
    """The tokens of ``grid.strided(stride)``, including the prefix.

    Shape: (B, N, C) -> (B, n, C)
    """
    if stride == 1:
        return x
    cells = x[:, grid.prefix :].unflatten(1, grid.shape)
    kept = (slice(None), *(slice(None, None, stride) for _ in grid.shape))
    strided = cells[kept].flatten(1, len(grid.shape))
    return torch.cat((x[:, : grid.prefix], strided), 1) if grid.prefix else strided


def on_cells(function: Callable[[Tensor], Tensor], x: Tensor, grid: TokenGrid) -> Tensor:
    """Apply a function (B, *shape, D) -> (B, *shape, E) to tokens; the prefix bypasses it.

    Shape: (B, N, D) -> (B, N, E); with a prefix, E must be D
    """
    cells = function(x[:, grid.prefix :].unflatten(1, grid.shape)).flatten(1, len(grid.shape))
    return torch.cat((x[:, : grid.prefix], cells), 1) if grid.prefix else cells


def on_grid(conv: nn.Module, x: Tensor, grid: TokenGrid) -> Tensor:
    """Apply a convolution (B, D, *shape) -> (B, E, *out) to tokens; the prefix bypasses it.

    Shape: (B, N, D) -> (B, n, E)
    """
    # The transposed view is an image in channels-last order: nothing is copied.
    image = x[:, grid.prefix :].mT.unflatten(2, grid.shape)
    y = conv(image).flatten(2).mT
    return torch.cat((x[:, : grid.prefix], y), 1) if grid.prefix else y
