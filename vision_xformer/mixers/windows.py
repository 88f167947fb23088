"""Attention in windows of the grid, or among tokens at an interval, for any kernel.

A shifted window that would reach over the edge is cut there: what Swin does by rolling the picture
and masking (Liu et al. 2021, arXiv 2103.14030, section 3.2) is done on smaller windows instead, so
no kernel needs a mask. So is the last window of a grid that is no multiple of it, where the authors
and timm add zeros, which are seen: there the same weights give other logits than theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels import Kernel
from ..layout import Layout
from ..positions import DynamicBias, RelativeBias
from ..registry import check_at_least, check_types
from .base import Mixer
from .slots import Slot


class Piece(NamedTuple):
    """A run of an axis from ``start``: ``windows`` of ``size`` cells, one after the other, or dealt
    in turn (``interval``)."""

    start: int
    windows: int
    size: int
    interval: bool = False


def axis_pieces(length: int, window: int, shift: int) -> list[Piece]:
    """Windows on an axis, the first cut after ``shift`` cells.

    >>> [tuple(p[:3]) for p in axis_pieces(14, 7, 3)]
    [(0, 1, 3), (3, 1, 7), (10, 1, 4)]
    """
    if length <= window:
        return [Piece(0, 1, length)]
    count, rest = divmod(length - shift, window)
    pieces = [Piece(0, 1, shift), Piece(shift, count, window), Piece(length - rest, 1, rest)]
    return [piece for piece in pieces if piece.windows and piece.size]


class Windowed(nn.Module):
    """A kernel that sees one window at a time. It takes what the kernel takes, on any grid.

    ``bias`` is that of a whole window, (H, w, w); a smaller one takes the beginning of each axis.
    """

    compresses = False

    def __init__(self, kernel: Kernel, slot: WindowSlot) -> None:
        super().__init__()
        self.kernel, self.slot, self.kv_heads = kernel, slot, kernel.kv_heads

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_layout: Layout,
        k_layout: Layout,
        bias: Tensor | None = None,
    ) -> Tensor:
        grid = q_layout.grid
        if q_layout.prefix:
            raise ValueError(f"windows have no place for {q_layout.prefix} prefix token(s)")
        operands = [t.unflatten(2, grid) for t in (q, k, v)]
        if bias is not None:
            bias = bias.unflatten(2, self.kernel.layout.grid).unflatten(1, self.kernel.layout.grid)
        pieces = [self.slot.pieces(length) for length in grid]

        def mixed(cut: tuple[Piece, ...]) -> Tensor:
            """(B, *lengths, H, V) of what is cut so on the first axes and whole on the rest."""
            axis = len(cut)
            if axis == len(grid):
                return self._windows(operands, cut, bias)
            parts = [mixed((*cut, piece)) for piece in pieces[axis]]
            return parts[0] if len(parts) == 1 else torch.cat(parts, axis + 1)

        return mixed(()).flatten(1, len(grid)).transpose(1, 2)

    def _windows(
        self, operands: list[Tensor], cut: tuple[Piece, ...], bias: Tensor | None
    ) -> Tensor:
        """(B, H, *grid, K) each -> (B, *lengths, H, V): the windows that the pieces cross in."""
        axes = range(len(cut))
        places: list[Any] = [slice(p.start, p.start + p.windows * p.size) for p in cut]
        sizes = {f"n{a}": cut[a].windows for a in axes} | {f"w{a}": cut[a].size for a in axes}
        numbers, cells = (" ".join(f"{letter}{a}" for a in axes) for letter in "nw")
        grid = " ".join(f"(w{a} n{a})" if cut[a].interval else f"(n{a} w{a})" for a in axes)
        here = (slice(None), slice(None), *places)
        gather = f"b h {grid} c -> (b {numbers}) h ({cells}) c"
        q, k, v = (rearrange(x[here], gather, **sizes) for x in operands)
        layout = Layout(tuple(p.size for p in cut))
        if bias is None:
            y = self.kernel(q, k, v, layout, layout)
        else:
            part: list[Any] = [slice(size) for size in layout.grid]
            corner = (slice(None), *part, *part)
            rows = bias[corner].flatten(1, len(cut)).flatten(2)
            y = self.kernel(q, k, v, layout, layout, rows)
        mixed: Tensor = rearrange(y, f"(b {numbers}) h ({cells}) c -> b {grid} h c", **sizes)
        return mixed


@dataclasses.dataclass(frozen=True)
class WindowSlot(Slot):
    """Swin's and CrossFormer's: attention in windows.

    Args:
        window: cells of a window on each axis; fewer where the grid has fewer. With an interval
            there are as many as it leaves.
        shift: cells after which the first window of each axis is cut.
        interval: with more than 1 a window is not a run of cells but every ``interval``-th one
            (long-distance attention, CrossFormer, Wang et al. 2021, arXiv 2108.00154, section 3.2);
            it divides each axis.
        bias_dim: width of the network that gives the bias of an offset (CrossFormer); by default
            the bias is learned for each offset (Swin).
        position_bias: whether the logits get a bias.
    """

    window: int = 7
    shift: int = 0
    interval: int = 1
    bias_dim: int | None = None
    position_bias: bool = True

    def __post_init__(self) -> None:
        check_types(vars(self), type(self))
        check_at_least("window", self.window, 1)
        check_at_least("interval", self.interval, 1)
        if not 0 <= self.shift < self.window:
            raise ValueError(f"shift {self.shift} must be between 0 and window {self.window} - 1")
        if self.shift and self.interval > 1:
            raise ValueError(f"interval {self.interval} has no windows to shift: shift must be 0")

    def pieces(self, length: int) -> list[Piece]:
        """How an axis is cut."""
        if self.interval == 1:
            return axis_pieces(length, self.window, self.shift)
        if length % self.interval:
            raise ValueError(
                f"an axis of {length} tokens must be a multiple of interval {self.interval}"
            )
        return [Piece(0, self.interval, length // self.interval, interval=True)]

    def kernel_layout(self, layout: Layout) -> Layout:
        if self.interval == 1:  # the same on any grid, so that a bias fits all of them
            return Layout((self.window,) * len(layout.grid))
        return Layout(tuple(self.pieces(g)[0].size for g in layout.grid))

    @property
    def bias_fixes_layout(self) -> bool:
        return self.position_bias and self.interval > 1

    def bias(self, layout: Layout, heads: int) -> nn.Module | None:
        if not self.position_bias:
            return None
        grid = self.kernel_layout(layout).grid
        if self.bias_dim is None:
            return RelativeBias(grid, heads)
        return DynamicBias(grid, heads, self.bias_dim)

    def wrap(self, kernel: Kernel, name: str, layout: Layout) -> nn.Module:
        if layout.prefix:
            raise ValueError(f"windows have no place for {layout.prefix} prefix token(s)")
        if kernel.compresses:
            raise ValueError(
                f"mixer {name!r} shortens a sequence of one length: windows are short already, and "
                "some are smaller"
            )
        return Windowed(kernel, self)

    def adapt(self, mixer: Mixer) -> Mixer:
        raise ValueError(f"{type(mixer).__name__} has no attention to put into windows")
