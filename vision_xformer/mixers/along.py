"""A mixer along some axes of the grid only: space-time mixing, factorised (Arnab et al. 2021,
ViViT, arXiv 2103.15691, section 3.3; Bertasius et al. 2021, arXiv 2102.05095)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..layout import Layout
from .base import Mixer


class Along(Mixer):
    """Places that differ on the other axes are samples of their own to the mixer.

    (B, N, D) -> same. Each of these samples has the prefix tokens; what they become is averaged.

    Args:
        mixer: built for the layout of :func:`part`.
        layout: of all tokens.
        axes: of the grid, those that are mixed.
    """

    def __init__(self, mixer: Mixer, layout: Layout, axes: tuple[int, ...]) -> None:
        super().__init__(mixer.dim, mixer.heads, layout)
        self.mixer, self.axes = mixer, axes
        self.fixed_layout, self.takes_rope = mixer.fixed_layout, mixer.takes_rope
        self.reaches_prefix = mixer.reaches_prefix
        if mixer.takes_rope:
            self.head_dim = mixer.head_dim

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        inner, prefix = part(layout, self.axes), layout.prefix
        y = self._samples(x, layout)
        others, cells = y.shape[1:-2], y.shape[-2:]
        y = y.flatten(0, -3)
        count = math.prod(others)
        if prefix:
            y = torch.cat((x[:, :prefix].repeat_interleave(count, 0), y), 1)
        if rope is not None:  # all samples have the same angles but for what they share
            rope = torch.cat((rope[:prefix], self._samples(rope[None], layout).flatten(0, -3)[0]))
        y = self.mixer(y, inner, rope)
        mixed = y[:, prefix:].reshape(-1, *others, *inner.grid, cells[-1])
        mixed = mixed.movedim(self._last(), self._places()).flatten(1, -2)
        if not prefix:
            return mixed
        return torch.cat((y[:, :prefix].unflatten(0, (-1, count)).mean(1), mixed), 1)

    def _places(self) -> list[int]:
        return [axis + 1 for axis in self.axes]

    def _last(self) -> list[int]:
        return list(range(-1 - len(self.axes), -1))

    def _samples(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, N, C) -> (B, *others, n, C), n places on the axes that are mixed."""
        grid = x[:, layout.prefix :].unflatten(1, layout.grid)
        return grid.movedim(self._places(), self._last()).flatten(-1 - len(self.axes), -2)


def part(layout: Layout, axes: tuple[int, ...]) -> Layout:
    """The layout of the tokens that differ on those axes only."""
    return Layout(tuple(layout.grid[axis] for axis in axes), layout.prefix)


def space_time(make: Callable[[Layout], Mixer], layout: Layout) -> list[Mixer]:
    """A mixer for each frame of a (T, H, W) grid, then one over time where there is any.

    Raises:
        ValueError: for a grid without time.
    """
    if len(layout.grid) != 3:
        raise ValueError(
            f"factorised=True needs frames, height and width, not a grid of {layout.grid}: "
            "input_shape must be (channels, frames, height, width)"
        )
    axes = [(1, 2)] + [(0,)] * (layout.grid[0] > 1)
    return [Along(make(part(layout, some)), layout, some) for some in axes]
