"""Any kernel inside windows of the grid, or among tokens at an interval.

Windows are truncated at the image border instead of rolled and masked as in Swin (Liu et al. 2021,
arXiv 2103.14030, section 3.2), so no kernel needs a mask. If the grid is not a multiple of the
window, the last window is truncated as well, whereas the authors and timm pad with zeros that are
attended to: the same weights then give different logits.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..grid import TokenGrid
from ..options import check_at_least, check_types
from .base import Kernel


class Piece(NamedTuple):
    """Part of an axis: ``windows`` of ``size`` cells, in runs or interleaved."""

    windows: int
    size: int
    interleaved: bool = False


def axis_pieces(length: int, window: int, shift: int) -> list[Piece]:
    """The parts of an axis, in order; the first window ends after ``shift`` cells.

    >>> [tuple(p[:2]) for p in axis_pieces(21, 7, 3)]
    [(1, 3), (2, 7), (1, 4)]
    """
    if length <= window:
        return [Piece(1, length)]
    count, rest = divmod(length - shift, window)
    pieces = [Piece(1, shift), Piece(count, window), Piece(1, rest)]
    return [piece for piece in pieces if piece.windows and piece.size]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a grid is cut into windows.

    Args:
        size: cells of a window on each axis; fewer where the grid has fewer. With an interval, a
            window has as many cells as the interval leaves.
        shift: cells after which the first window of each axis ends.
        interval: above 1, a window is every ``interval``-th cell instead of a run of cells
            (long-distance attention, CrossFormer, Wang et al. 2021, arXiv 2108.00154, section 3.2);
            it must divide each axis.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    size: int = 7
    shift: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        check_types(vars(self), type(self))
        check_at_least("window size", self.size, 1)
        check_at_least("interval", self.interval, 1)
        if not 0 <= self.shift < self.size:
            raise ValueError(
                f"shift {self.shift} must be between 0 and {self.size - 1}, below the window"
            )
        if self.shift and self.interval > 1:
            raise ValueError(f"interval {self.interval} has no windows to shift: shift must be 0")

    def pieces(self, length: int) -> list[Piece]:
        """The pieces that an axis of ``length`` cells is cut into."""
        if self.interval == 1:
            return axis_pieces(length, self.size, self.shift)
        if length % self.interval:
            raise ValueError(
                f"an axis of {length} tokens must be a multiple of interval {self.interval}"
            )
        return [Piece(self.interval, length // self.interval, interleaved=True)]

    def grid(self, grid: TokenGrid) -> TokenGrid:
        """The grid of one whole window.

        Raises:
            ValueError: for a grid with prefix tokens, which no window contains.
        """
        if grid.prefix:
            raise ValueError(f"windows cannot contain {grid.prefix} prefix token(s)")
        if self.interval == 1:  # the same on any grid, so that a bias fits all of them
            return TokenGrid((self.size,) * len(grid.shape))
        return TokenGrid(tuple(self.pieces(size)[0].size for size in grid.shape))


class WindowedKernel(Kernel):
    """A kernel that attends within one window at a time.

    Shape: (B, H, N, K), (B, G, N, K), (B, G, N, V) -> (B, H, N, V)

    Args:
        kernel: built for the grid of one window.
        windows: how the grid is cut. With an interval the kernel is tied to its grid.

    ``bias`` is that of a whole window, (H, w, w); a smaller window uses its leading part on each
    axis.
    """

    def __init__(self, kernel: Kernel, windows: Windows) -> None:
        super().__init__(kernel.site)
        self.kernel, self.windows = kernel, windows
        self.takes_rope, self.takes_bias = kernel.takes_rope, kernel.takes_bias
        self.fixed = windows.interval > 1

    @property
    def operand_widths(self) -> tuple[int, ...]:
        """Widths of q, k and v over all heads, see :class:`Kernel`."""
        return self.kernel.operand_widths

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend: q (B, H, N, K), k (B, G, M, K), v (B, G, M, V) -> (B, H, N, V)."""
        if queries.prefix:
            raise ValueError(f"windows cannot contain {queries.prefix} prefix token(s)")
        shape, window = queries.shape, self.site.keys.shape
        operands = [t.unflatten(2, shape) for t in (q, k, v)]
        if bias is not None:
            bias = bias.unflatten(2, window).unflatten(1, window)
        pieces = [self.windows.pieces(length) for length in shape]

        def attended(operands: list[Tensor], cut: tuple[Piece, ...]) -> Tensor:
            """(B, *lengths, H, V) of operands that are cut to these pieces on their first axes."""
            axis = len(cut)
            if axis == len(shape):
                return self._attend(operands, cut, bias)
            # not slices, whose gradients would each be padded to the size of the operand and added
            lengths = [piece.windows * piece.size for piece in pieces[axis]]
            regions = zip(*(x.split(lengths, axis + 2) for x in operands), strict=True)
            parts = [
                attended([*region], (*cut, piece))
                for piece, region in zip(pieces[axis], regions, strict=True)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, axis + 1)

        return attended(operands, ()).flatten(1, len(shape)).transpose(1, 2)

    def check_map(self) -> None:
        """Raise a ValueError if the kernel of the windows has no attention map."""
        self.kernel.check_map()

    def _attend(
        self, operands: list[Tensor], cut: tuple[Piece, ...], bias: Tensor | None
    ) -> Tensor:
        """(B, H, *grid, K) each -> (B, *lengths, H, V): the windows where the pieces cross.

        On images a run of windows is "b h (n0 w0) (n1 w1) c -> (b n0 n1) h (w0 w1) c".
        """
        axes = range(len(cut))
        sizes = {f"n{a}": cut[a].windows for a in axes} | {f"w{a}": cut[a].size for a in axes}
        numbers, cells = (" ".join(f"{letter}{a}" for a in axes) for letter in "nw")
        shape = " ".join(f"(w{a} n{a})" if cut[a].interleaved else f"(n{a} w{a})" for a in axes)
        gather = f"b h {shape} c -> (b {numbers}) h ({cells}) c"
        q, k, v = (rearrange(x, gather, **sizes) for x in operands)
        grid = TokenGrid(tuple(p.size for p in cut))
        if bias is not None:
            leading = [slice(size) for size in grid.shape]
            corner = (slice(None), *leading, *leading)
            bias = bias[corner].flatten(1, len(cut)).flatten(2)
        y = self.kernel(q, k, v, grid, grid, bias)
        return rearrange(y, f"(b {numbers}) h ({cells}) c -> b {shape} h c", **sizes)
