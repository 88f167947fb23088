"""Mixers without queries and keys in backbones that add layers around their attention."""

from __future__ import annotations

from torch import Tensor, nn

from ..grid import TokenGrid, on_grid, take_strided
from ..kernels import ValuePath, merge_heads, split_heads
from .base import Mixer


class Adapter(Mixer):
    """A convolution, a mixer, a stride and an output projection: (B, N, D) -> (B, n, E).

    Args:
        mixer: of width D, without queries and keys.
        conv: applied on the grid first, (B, D, *shape) -> same.
        stride: every such position of the mixer's output is kept.
        proj: output projection (B, n, D) -> (B, n, E).
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        conv: nn.Module | None = None,
        stride: int = 1,
        proj: nn.Module | None = None,
    ) -> None:
        super().__init__(mixer.dim, mixer.heads, mixer.grid)
        self.fixed, self.updates_prefix = mixer.fixed, mixer.updates_prefix
        self.conv, self.mixer, self.stride = conv, mixer, stride
        self.proj = nn.Identity() if proj is None else proj

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """The positions of the output tokens for an input grid."""
        return grid.strided(self.stride)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Mix tokens: (B, N, D) -> (B, n, E)."""
        self.check(x, grid, rope)
        y = self.mixer(self._input(x, grid), grid)
        return self.proj(take_strided(y, grid, self.stride))

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its values, see :class:`Mixer`."""
        self.check(x, grid, rope)
        path = self.mixer.value_path(self._input(x, grid), grid)

        def apply(values: Tensor) -> Tensor:
            y = path.apply(values)
            return split_heads(take_strided(merge_heads(y), grid, self.stride), y.shape[1])

        return path._replace(
            apply=apply, finish=lambda y: self.proj(path.finish(y)), queries=self.out_grid(grid)
        )

    def _input(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """The tokens that the mixer sees: (B, N, D) -> same."""
        return x if self.conv is None else on_grid(self.conv, x, grid)
