"""Attention from parts: projection -> rotation -> kernel (with a bias) -> output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..biases import AttentionBias
from ..grid import TokenGrid, take_strided
from ..kernels import Kernel, ValuePath
from ..kernels.linformer import Linformer
from ..positions import rotate
from .base import Mixer
from .local import LocalKind, LocalValues

Shorten = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Projection(nn.Module):
    """Tokens (B, N, D) to q (B, n, H K), k (B, M, G K) and v (B, M, G V).

    Args:
        dim: token width D.
        grid: positions of the N tokens.
        widths: of q, k and v; of q and k if the values are the keys.

    Attributes:
        stride: stride of the queries, and so of the output tokens, on the grid.
        kv_stride: stride of keys and values on the grid.
    """

    stride: int = 1
    kv_stride: int = 1

    def __init__(self, dim: int, grid: TokenGrid, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.grid, self.widths = dim, grid, widths

    def forward(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens (B, N, D) on ``grid`` to q, k and v; v is k where there are two widths."""
        raise NotImplementedError

    def queries(self, grid: TokenGrid) -> TokenGrid:
        """The positions of the queries, which are those of the output tokens."""
        return grid if self.stride == 1 else grid.strided(self.stride)

    def keys(self, grid: TokenGrid) -> TokenGrid:
        """The positions of keys and values."""
        return grid if self.kv_stride == 1 else grid.strided(self.kv_stride)

    def angles(self, rope: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """The rows of angles (N, A) that belong to queries (n, A) and keys (M, A)."""
        q, k = (take_strided(rope[None], grid, s)[0] for s in (self.stride, self.kv_stride))
        return q, k


class LinearProjection(Projection):
    """One linear layer to q, k and v, as in ViT. Shape: (B, N, D) -> (B, N, sum(widths)), split.

    Args:
        dim: token width D.
        grid: positions of the N tokens.
        widths: of q, k and v; of q and k if the values are the keys.
        bias: whether the layer has one.
    """

    def __init__(self, dim: int, grid: TokenGrid, widths: tuple[int, ...], bias: bool) -> None:
        super().__init__(dim, grid, widths)
        self.qkv = nn.Linear(dim, sum(widths), bias=bias)

    def forward(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Project: (B, N, D) -> (B, N, H K), (B, N, G K), (B, N, G V)."""
        q, k, *v = self.qkv(x).split(self.widths, -1)
        return q, k, v[0] if v else k


class SplitProjection(Projection):
    """A linear layer each to q, k and v, whose inputs may differ.

    Shape: (B, N, D) -> (B, n, H K), (B, M, G K), (B, M, G V)

    Args:
        dim: token width D.
        grid: positions of the N tokens.
        widths: of q, k and v; of q and k if the values are the keys.
        bias: whether the layers have one.
    """

    def __init__(self, dim: int, grid: TokenGrid, widths: tuple[int, ...], bias: bool) -> None:
        super().__init__(dim, grid, widths)
        self.q, self.k = (nn.Linear(dim, width, bias=bias) for width in widths[:2])
        self.v = nn.Linear(dim, widths[2], bias=bias) if len(widths) == 3 else None

    def inputs(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of the three layers: (B, n, D), (B, M, D), (B, M, D)."""
        return x, x, x

    def forward(
        self, x: Tensor, grid: TokenGrid, shorten: Shorten | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens to q, k and v.

        ``shorten``, (B, M, C), (B, M, C') -> (B, R, C), (B, R, C'), reduces the inputs of keys and
        values to R sums over tokens before the layers: E^T (x W) equals (E^T x) W.
        """
        xq, xk, xv = self.inputs(x, grid)
        if shorten is None:
            k = self.k(xk)
            return self.q(xq), k, k if self.v is None else self.v(xv)
        ones = x.new_ones(1, xk.shape[1], 1)
        (xk, xv), (sums_k, sums_v) = shorten(xk, xv), shorten(ones, ones)
        k = _project_sums(self.k, xk, sums_k)
        return self.q(xq), k, k if self.v is None else _project_sums(self.v, xv, sums_v)


def _project_sums(layer: nn.Linear, x: Tensor, sums: Tensor) -> Tensor:
    """Apply a layer to weighted sums over tokens (B, R, C), with its bias weighted likewise.

    ``sums`` (1, R, 1) are the sums of the weights. The layer is called on zero to get its bias.
    """
    if layer.bias is None:
        return layer(x)
    y, bias = layer(torch.cat((x, x.new_zeros(x.shape[0], 1, x.shape[2])), 1)).split(
        (x.shape[1], 1), 1
    )
    return y + (sums - 1) * bias


class Attention(Mixer):
    """Multi-head attention composed of a projection, a kernel and an output projection.

    Args:
        projection: tokens to queries, keys and values.
        kernel: the arithmetic between them.
        proj: output projection (B, n, H V) -> (B, n, E).
        bias: position bias () -> (H, n, M), added to the logits.
        proj_dropout: dropout after the output projection.
        local: depth-wise convolution of the values that is added to the output of the kernel, or
            None.
        gate: whether the output of the kernel is multiplied by silu(x W + b).

    Raises:
        ValueError: for a bias with a kernel that does not support one, or ``local`` or ``gate``
            if a token does not have one query, key and value.
    """

    def __init__(
        self,
        projection: Projection,
        kernel: Kernel,
        proj: nn.Module,
        *,
        bias: AttentionBias | None = None,
        proj_dropout: float = 0.0,
        local: LocalKind | None = None,
        gate: bool = False,
    ) -> None:
        super().__init__(projection.dim, kernel.site.heads, projection.grid)
        if bias is not None and not kernel.takes_bias:
            raise ValueError(
                f"{type(kernel).__name__} has no attention map that a bias can be added to: "
                "position_bias must be False"
            )
        self.projection, self.kernel, self.position_bias = projection, kernel, bias
        self.proj, self.proj_drop = proj, nn.Dropout(proj_dropout)
        grid, (heads, _, value_dim, *_) = projection.grid, kernel.site
        if (local or gate) and not projection.queries(grid) == projection.keys(grid) == grid:
            raise ValueError(
                f"local={local!r} and gate={gate} need a query and a key for each token, which "
                f"{type(projection).__name__} does not have here: leave them out"
            )
        values = kernel.operand_widths[-1] // value_dim
        self.local = LocalValues(local, len(grid.shape), values, value_dim) if local else None
        self.gate = nn.Linear(projection.dim, heads * value_dim) if gate else None
        self.rope_dim = kernel.site.key_dim if kernel.takes_rope else None
        self.fixed = kernel.fixed or (bias is not None and bias.fixed)

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """The positions of the output tokens for an input grid."""
        return self.projection.queries(grid)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Attend: (B, N, D) -> (B, n, E)."""
        if x.shape[1:] != self.tokens_shape or grid != self.grid or rope is not None:
            self.check(x, grid, rope)
        kernel, gate = self.kernel, self._gate(x)
        # A sum over tokens is cheaper before the projection, unless a rotation comes in between.
        if (
            rope is None
            and self.local is None
            and isinstance(kernel, Linformer)
            and isinstance(self.projection, SplitProjection)
        ):
            operands = self._operands(x, grid, rope, kernel.shorten)
            return self._finish(kernel(*operands, shortened=True), gate)
        operands = self._operands(x, grid, rope)
        y = kernel(*operands)
        if self.local is not None:
            y = y + self.local(operands[2], grid)
        return self._finish(y, gate)

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the attention as a function of its values, see :class:`Mixer`."""
        self.check(x, grid, rope)
        path = self.kernel.value_path(*self._operands(x, grid, rope))
        local, attend = self.local, path.apply
        if local is not None:
            path = path._replace(apply=lambda v: attend(v) + local(v, grid))
        return path._replace(finish=partial(self._finish, gate=self._gate(x)))

    def check(self, x: Tensor, grid: TokenGrid, rope: Tensor | None) -> None:
        """Raise a ValueError unless tokens, grid and angles fit, see :class:`Mixer`."""
        super().check(x, grid, rope)
        if self.local is not None:
            self.check_axes(grid)

    def _gate(self, x: Tensor) -> Tensor | None:
        """Compute the factors of the output of the kernel, (B, N, H V)."""
        return None if self.gate is None else F.silu(self.gate(x))

    def _operands(
        self, x: Tensor, grid: TokenGrid, rope: Tensor | None, *shorten: Shorten
    ) -> tuple[Tensor, Tensor, Tensor, TokenGrid, TokenGrid, Tensor | None]:
        """The arguments of the kernel; ``shorten`` is passed to the projection."""
        projection, site = self.projection, self.kernel.site
        q, k, v = projection(x, grid, *shorten)
        angles = (None, None) if rope is None else projection.angles(rope, grid)
        queries = _split_heads(q, site.key_dim, angles[0])
        keys = _split_heads(k, site.key_dim, angles[1])
        values = keys if v is k and rope is None else _split_heads(v, site.value_dim)
        bias = None if self.position_bias is None else self.position_bias()
        return queries, keys, values, projection.queries(grid), projection.keys(grid), bias

    def _finish(self, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """Gate and project the output of the kernel: (B, H, n, V) -> (B, n, E)."""
        y = rearrange(y, "b h n v -> b n (h v)")
        return self.proj_drop(self.proj(y if gate is None else y * gate))


def _split_heads(x: Tensor, width: int, angles: Tensor | None = None) -> Tensor:
    """(B, N, H K) -> (B, H, N, K), rotated by angles (N, A) if there are any."""
    x = rearrange(x, "b n (h k) -> b n h k", k=width)
    if angles is not None:
        x = rotate(x, angles)
    return x.transpose(1, 2)
