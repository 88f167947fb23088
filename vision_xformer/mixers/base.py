"""The slot a block has: a module that mixes tokens and owns all of its parameters."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..kernels import KERNELS
from ..layout import Layout
from ..registry import Registry


class Mixer(nn.Module):
    """Maps tokens (B, N, D) to (B, n, E); n = N and E = D unless the slot asks for something else.

    Options are keyword-only constructor arguments.

    Args:
        dim: token width D.
        heads: number of heads; ``None`` exactly for mixers without (``takes_heads = False``).
        layout: where the N tokens lie.

    Attributes:
        takes_heads: whether the mixer has heads.
        takes_rope: whether it has queries and keys that can be rotated, of width ``head_dim``.
        reaches_prefix: whether prefix tokens learn anything of the others.
        fixed_layout: whether parameters are sized by ``layout``, so that it takes no other.
    """

    takes_heads: ClassVar[bool] = True
    takes_rope: bool = False
    reaches_prefix: bool = True
    head_dim: int
    fixed_layout: bool = False

    def __init__(self, dim: int, heads: int | None, layout: Layout) -> None:
        super().__init__()
        self.dim, self.heads, self.layout = dim, heads, layout

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        """``rope``: (N, A) angles, see :class:`~vision_xformer.positions.RotaryPosition`."""
        raise NotImplementedError

    def out_layout(self, layout: Layout) -> Layout:
        """Where the tokens lie that come out."""
        return layout

    def check(self, x: Tensor, layout: Layout, rope: Tensor | None) -> None:
        """Raise a ValueError for what this mixer cannot take."""
        name = type(self).__name__
        if x.ndim != 3 or x.shape[1:] != (layout.length, self.dim):
            raise ValueError(
                f"{name} got tokens of shape {tuple(x.shape)}; "
                f"{layout} and dim {self.dim} need (B, {layout.length}, {self.dim})"
            )
        if self.fixed_layout and layout != self.layout:
            raise ValueError(
                f"{name} was built for {self.layout} and cannot take {layout}: build it for that; "
                "load_weights(..., resize=True) carries tables of tokens over"
            )
        if rope is not None and not self.takes_rope:
            raise ValueError(f"{name} has no queries and keys to rotate: leave rope out")
        if rope is not None and rope.shape[0] != layout.length:
            raise ValueError(
                f"rope of shape {tuple(rope.shape)} must have a row for each of the "
                f"{layout.length} tokens of {layout}"
            )


MIXERS: Registry[Mixer] = Registry("mixer", beside=KERNELS)
