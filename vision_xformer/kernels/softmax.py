"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): softmax(q k^T / sqrt(K) + bias) v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forms import device_type, is_transformed, plain_second
from ..grid import TokenGrid
from ..options import check_probability
from .base import KERNELS, Kernel, Site

_SMALL_MAP = 2**18  # entries of a head's map: 2 bytes each fit in the cache of one core


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention, fused (the map is never stored) unless the explicit formula is faster.

    PyTorch's CPU kernel is fused only without dropout and bias and for V == K; its fallback is
    slower than the explicit formula, which is used here instead. The fused backward pass is also
    slower for small maps in half precision: 4 times at 64 x 64 tokens, twice at 256 x 256. The
    explicit formula is also used for torch.func and second derivatives, which the kernel does not
    support.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V), bias (H, N, M) -> (B, H, N, V)
    """
    fused = dropout == 0 and bias is None and v.shape[-1] == q.shape[-1]
    small = q.shape[-2] * k.shape[-2] <= _SMALL_MAP and q.element_size() == 2
    learns = q.requires_grad and not torch.jit.is_tracing()  # traces are checked under no_grad
    slower = device_type(q) == "cpu" and (not fused or (small and learns))
    if slower or is_transformed(q, k, v):
        return _attend_explicitly(q, k, v, bias, dropout)
    out = F.scaled_dot_product_attention(q, k, v, bias, dropout)
    return out if dropout else plain_second(out, _attend_explicitly, q, k, v, bias)


def _attend_explicitly(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float = 0.0
) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.mT  # scaling q is cheaper than scaling the map
    if bias is not None:
        # in place, unless only the bias is batched by vmap
        logits = logits + bias if is_transformed(bias) else logits.add_(bias)
    return F.dropout(logits.softmax(-1), dropout) @ v


def attend_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Count 2 N M (K + V) for each head: the map, and its product with the values."""
    batch, heads, queries, key_dim = q.shape
    return 2 * batch * heads * queries * k.shape[-2] * (key_dim + v.shape[-1])


class MapKernel(Kernel):
    """Base of the kernels that form an attention map.

    Args:
        site: heads, widths and grids of the kernel.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for a probability outside [0, 1].
    """

    def __init__(self, site: Site, *, dropout: float = 0.0) -> None:
        super().__init__(site)
        check_probability("dropout", dropout)
        self.dropout = dropout

    @property
    def dropout_now(self) -> float:
        """The dropout probability in the current mode: 0 in evaluation."""
        return self.dropout if self.training else 0.0

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count the operations of :func:`attend`."""
        return attend_flops(q, k, v)

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"dropout={self.dropout}" if self.dropout else ""


@KERNELS.register("softmax")
class Softmax(MapKernel):
    """Fused softmax attention (:func:`attend`): memory linear in N, time quadratic.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        dropout: probability of dropping an attention weight in training.
    """

    takes_bias = True

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
        return attend(q, k, v, bias, self.dropout_now)


@KERNELS.register("softmax_eager")
class SoftmaxEager(MapKernel):
    """Materialized softmax attention: the N x M map is stored, as was usual in 2021.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        dropout: probability of dropping an attention weight in training.
    """

    takes_bias = True

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
        logits = q @ k.mT * self.site.key_dim**-0.5
        if bias is not None:
            logits = logits + bias
        return F.dropout(logits.softmax(-1), self.dropout_now) @ v
