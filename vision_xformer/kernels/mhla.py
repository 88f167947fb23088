"""Multi-head linear attention over blocks (Zhang et al. 2026, MHLA, arXiv 2601.07832).

The grid is cut into B blocks of keys with sums S_b = sum_j f(k_j)^T [v_j, 1], f = relu. A query in
block a uses a mixture of them, with a learned matrix C, (B, B):

    [y, z] = f(q) sum_b C_ab S_b,  output y / z

so queries in different parts of the image read different summaries, which together have a higher
rank than the single one of linear attention. The cost is N K V + B^2 K V, linear in N for B^2 <= N.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..grid import TokenGrid, grid_parts
from ..options import check_at_least
from ..precision import to_accumulate, without_autocast
from .base import KERNELS, Kernel, Site
from .feature_maps import FEATURE_MAPS

_EPS = 1e-6  # the absolute value has no gradient at 0


def local_mixing(parts: tuple[int, ...], prefix: bool) -> Tensor:
    """Compute the initial C: 1 - distance / largest distance of two blocks, in rows that sum to 1.

    Prefix tokens are a block of their own, the first, at distance 0 from all others.

    Shape: () -> (B, B)
    """
    blocks = torch.tensor([*itertools.product(*map(range, parts))], dtype=torch.float32)
    distances = F.pad(torch.cdist(blocks, blocks), (int(prefix), 0, int(prefix), 0))
    nearness = (1 - distances / distances.max().clamp(min=1)).clamp(min=_EPS)
    return (nearness / nearness.sum(1, keepdim=True)).to(torch.get_default_dtype())


class Blocks(NamedTuple):
    """How a grid is cut into blocks of equal size; the last ones may be padded, or empty.

    Args:
        shape: cells of the grid on each axis.
        parts: number of blocks on each axis.
        cells: cells of a block on each axis.
    """

    shape: tuple[int, ...]
    parts: tuple[int, ...]
    cells: tuple[int, ...]

    def cut(self, x: Tensor) -> Tensor:
        """Cut, and pad with zeros: (B, H, prod(shape), F) -> (B, H, prod(parts), w, F)."""
        x = x.unflatten(2, self.shape)
        padding = [
            (0, count * width - size)
            for size, count, width in zip(self.shape, self.parts, self.cells, strict=True)
        ]
        if any(after for _, after in padding):
            x = F.pad(x, (0, 0, *itertools.chain(*reversed(padding))))
        return rearrange(x, f"b h {self._axes} f -> b h {self._blocks} f", **self._counts)

    def join(self, x: Tensor) -> Tensor:
        """Undo :meth:`cut`: (B, H, prod(parts), w, F) -> (B, H, prod(shape), F)."""
        x = rearrange(x, f"b h {self._blocks} f -> b h {self._axes} f", **self._counts)
        inside = (slice(None), slice(None), *map(slice, self.shape))
        return x[inside].flatten(2, -2)

    @property
    def _counts(self) -> dict[str, int]:
        named = zip("nw", (self.parts, self.cells), strict=True)
        return {f"{x}{axis}": count for x, row in named for axis, count in enumerate(row)}

    @property
    def _axes(self) -> str:
        return " ".join(f"(n{axis} w{axis})" for axis in range(len(self.shape)))

    @property
    def _blocks(self) -> str:
        rows = (" ".join(f"{x}{axis}" for axis in range(len(self.shape))) for x in "nw")
        return "({}) ({})".format(*rows)


def cut_keys(keys: TokenGrid, queries: TokenGrid, count: int) -> Blocks:
    """Cut the grid of the keys into at most ``count`` blocks.

    Strided queries skip keys: blocks are then a multiple of the stride wide.
    """
    parts, cells = grid_parts(keys.shape, count), []
    for size, part, reduced in zip(keys.shape, parts, queries.shape, strict=True):
        stride = -(-size // reduced) if 0 < reduced < size else 1
        cells.append(-(-size // part // stride) * stride)
    return Blocks(keys.shape, parts, tuple(cells))


def cut_queries(queries: TokenGrid, keys: Blocks) -> Blocks:
    """Cut the grid of the queries into as many blocks, which cover the same parts of the image."""
    cells = []
    for size, of_keys, part, width in zip(queries.shape, *keys, strict=True):
        stride, upscale = -(-of_keys // max(size, 1)), -(-size // of_keys)  # one of them is 1
        cells.append(max(-(-width // stride) * max(upscale, 1), -(-size // part)))
    return Blocks(queries.shape, keys.parts, tuple(cells))


@KERNELS.register("mhla")
class Mhla(Kernel):
    """Linear attention whose summaries of blocks are mixed for each block of queries.

    The blocks tie the kernel to the grid of the keys; queries may be on any grid with as many
    axes. Prefix tokens are a block of their own. |C| is used instead of C, so that no sum of
    weights is 0. With a single block, C would cancel and is omitted.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        blocks: maximum number of blocks of the grid; by default sqrt(M), for which the cost is
            linear. The shape of C depends on it: set it to load weights on a grid of another size.
            The paper's DeiT models have 4 blocks of 7 x 7 tokens.

    Raises:
        ValueError: for less than 1 block, queries and keys on grids of different axes, or, in a
            call, keys on another grid.
    """

    takes_rope = False
    fixed = True

    def __init__(self, site: Site, *, blocks: int | None = None) -> None:
        super().__init__(site)
        cells = math.prod(site.keys.shape)
        blocks = max(1, math.isqrt(cells)) if blocks is None else blocks
        check_at_least("blocks", blocks, 1)
        self.check_axes(site.queries, site.keys)
        self.blocks = cut_keys(site.keys, site.queries, blocks)
        self.weight_grid = self.blocks.parts
        self.features = FEATURE_MAPS["relu"](site.heads, site.key_dim, True)
        mixing = local_mixing(self.blocks.parts, site.keys.prefix > 0)
        self.mixing = nn.Parameter(mixing) if len(mixing) > 1 else None

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
        self.check_keys(keys)
        self.check_axes(queries, keys)
        wide_q, wide_k, values = to_accumulate(q, k, v)
        with without_autocast(q):  # sums over tokens overflow in float16
            fq, fk = self.features(wide_q, queries), self.features(wide_k, keys)
            sums = self._summaries(fk, F.pad(values, (0, 1), value=1.0), keys.prefix)
            if self.mixing is not None:
                # expanded, because matmul would transpose and copy the sums for a single matrix
                mixing = self.mixing.to(sums).abs().expand(*sums.shape[:2], -1, -1)
                sums = (mixing @ sums.flatten(3)).view_as(sums)
            y, total = self._read(fq, sums, queries).split((values.shape[-1], 1), -1)
            return (y / total).to(v.dtype)

    def _summaries(self, fk: Tensor, values: Tensor, prefix: int) -> Tensor:
        """Sums of the prefix, if any, and of each block: (B, H, blocks, K, V + 1)."""
        blocks = [self.blocks.cut(x[:, :, prefix:]) for x in (fk, values)]
        sums = blocks[0].mT @ blocks[1]
        if not prefix:
            return sums
        first = fk[:, :, :prefix].mT @ values[:, :, :prefix]
        return torch.cat((first[:, :, None], sums), 2)

    def _read(self, fq: Tensor, mixed: Tensor, queries: TokenGrid) -> Tensor:
        """Multiply each query with the mixture of its block: (B, H, N, V + 1)."""
        prefix, own = queries.prefix, mixed.shape[2] > math.prod(self.blocks.parts)
        rows = []
        if prefix:  # without prefix keys, prefix queries read the first block
            rows.append(fq[:, :, :prefix] @ mixed[:, :, 0])
        if fq.shape[2] > prefix:
            blocks = cut_queries(queries, self.blocks)
            rows.append(blocks.join(blocks.cut(fq[:, :, prefix:]) @ mixed[:, :, int(own) :]))
        return rows[0] if len(rows) == 1 else torch.cat(rows, 2)

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 (N + M + B^2) K (V + 1) for each head, B blocks including that of the prefix."""
        pairs = 0 if self.mixing is None else self.mixing.numel()
        mixed = q.shape[0] * q.shape[1] * pairs * q.shape[-1]
        return 2 * (q.numel() + k.numel() + mixed) * (v.shape[-1] + 1)

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"blocks={math.prod(self.blocks.parts)}"
