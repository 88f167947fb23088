"""Mixers without queries and keys in backbones that add layers around their attention."""

from __future__ import annotations

from torch import Tensor, nn

from ..grid import TokenGrid, on_grid, take_strided
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
        if self.conv is not None:
            x = on_grid(self.conv, x, grid)
        return self.proj(take_strided(self.mixer(x, grid), grid, self.stride))
