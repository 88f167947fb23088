"""Position biases that are added to the logits of an attention map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .grid import TokenGrid
from .positions import FixedTable, TokenTable


class _Offsets(FixedTable):
    """Row-major index of the offset between each query and each key. Shape: () -> (N * M,).

    The offset on each axis is a distance from 0 to g - 1, or with ``signed`` from 1 - g to g - 1,
    counted from 0.
    """

    follows_type = False

    def __init__(self, grid: TokenGrid, stride: int = 1, signed: bool = False) -> None:
        super().__init__()
        self.tokens, self.stride, self.signed = grid, stride, signed
        self.register_buffer("table", self._make(torch.get_default_device()), persistent=False)

    def _make(self, device: torch.device) -> Tensor:
        index = torch.zeros((), dtype=torch.long, device=device)
        axes = [torch.arange(size, device=device) for size in self.tokens.shape]
        queries = torch.cartesian_prod(*(a[:: self.stride] for a in axes)).view(-1, len(axes))
        keys = torch.cartesian_prod(*axes).view(-1, len(axes))
        for axis, size in enumerate(self.tokens.shape):
            offset = queries[:, None, axis] - keys[:, axis]
            if self.signed:
                index = index * (2 * size - 1) + offset + size - 1
            else:
                index = index * size + offset.abs()
        return index.flatten().int()


class AttentionBias(nn.Module):
    """A position bias that is added to the logits. Shape: () -> (H, N, M).

    Attributes:
        fixed: whether it is tied to the grid of its tokens.
    """

    fixed: bool = False

    def forward(self) -> Tensor:
        """The bias (H, N, M)."""
        raise NotImplementedError


class PositionBias(TokenTable, AttentionBias):
    """A learned value for each head and distance (LeViT, Graham et al. 2021, eq. 1).

    The distance between a query and a key is taken along each axis. Values are initialized to zero.

    Shape: () -> (H, N, M)

    Args:
        grid: positions of the M keys, without prefix tokens.
        heads: number of heads H.
        stride: the N queries are at ``grid.strided(stride)``.

    Raises:
        ValueError: for a grid with prefix tokens.
    """

    fixed = True

    def __init__(self, grid: TokenGrid, heads: int, stride: int = 1) -> None:
        if grid.prefix:
            raise ValueError(f"a position bias has no distance to {grid.prefix} prefix token(s)")
        super().__init__(grid, heads, std=0.0)
        self.shape = (grid.strided(stride).length, grid.length)
        self.offsets = _Offsets(grid, stride)

    def forward(self) -> Tensor:
        """The bias (H, N, M)."""
        return _bias_map(self.grid.flatten(0, -2), self.offsets, self.shape)


class RelativeBias(AttentionBias):
    """A learned value for each head and signed offset (Swin, Liu et al. 2021, eq. 4).

    Values are initialized to zero.

    Shape: () -> (H, N, N)

    Args:
        shape: grid shape of the N tokens of a window.
        heads: number of heads H.
    """

    def __init__(self, shape: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.length = math.prod(shape)
        self.table = TokenTable(TokenGrid(tuple(2 * size - 1 for size in shape)), heads, std=0.0)
        self.offsets = _Offsets(TokenGrid(shape), signed=True)

    def forward(self) -> Tensor:
        """The bias (H, N, N)."""
        return _bias_map(self.table(), self.offsets, (self.length, self.length))


class DynamicBias(AttentionBias):
    """A value for each head and signed offset, predicted by a small network.

    The network is that of CrossFormer (Wang et al. 2021, section 3.3).

    Shape: () -> (H, N, N)

    Args:
        shape: grid shape of the N tokens of a window.
        heads: number of heads H.
        hidden_dim: width of the network.
    """

    def __init__(self, shape: tuple[int, ...], heads: int, hidden_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(len(shape), hidden_dim)]
        for width in (hidden_dim, hidden_dim, heads):
            layers += [nn.LayerNorm(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, width)]
        self.layers = nn.Sequential(*layers)
        self.shape, self.length = shape, math.prod(shape)
        self.offsets = _Offsets(TokenGrid(shape), signed=True)

    def forward(self) -> Tensor:
        """The bias (H, N, N)."""
        # of the norm: linear layers may be quantized, and replicas have no parameters()
        like: Any = self.layers[1].weight
        axes = [torch.arange(1 - g, g, device=like.device, dtype=like.dtype) for g in self.shape]
        rows = self.layers(torch.cartesian_prod(*axes).view(-1, len(axes)))
        return _bias_map(rows, self.offsets, (self.length, self.length))


def _bias_map(rows: Tensor, offsets: _Offsets, shape: tuple[int, int]) -> Tensor:
    """Look up a row of H values for each offset: (P, H) -> (H, N, M)."""
    return rows.mT.index_select(1, offsets(rows)).unflatten(1, shape)
