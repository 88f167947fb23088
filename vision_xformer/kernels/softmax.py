"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): softmax(q k^T / sqrt(K) + bias) v."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..layout import Layout
from ..registry import check_share
from .base import KERNELS, Kernel

_SMALL_MAP = 2**18  # entries of a head's map: 2 bytes each, less than a core's cache


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Fused: the map is never stored.

    On the CPU that is so without dropout and bias and for values as wide as keys. For the rest
    PyTorch has no fused form there, and its stand-in is slower than the plain equation. So is its
    fused backward pass of small maps in half precision: 4 times at 64 x 64, 2 times at 256 x 256.
    """
    fused = dropout == 0 and bias is None and v.shape[-1] == q.shape[-1]
    small = q.shape[-2] * k.shape[-2] <= _SMALL_MAP and q.element_size() == 2
    if q.device.type != "cpu" or (fused and not (small and q.requires_grad)):
        return F.scaled_dot_product_attention(q, k, v, bias, dropout)
    logits = (q * q.shape[-1] ** -0.5) @ k.mT  # scaling q is less than scaling the map
    if bias is not None:
        logits += bias
    return F.dropout(logits.softmax(-1), dropout) @ v


def attend_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    """2 N M (K + V) for each head: the map, and its product with the values."""
    batch, heads, queries, key_dim = q.shape
    return 2 * batch * heads * queries * k.shape[-2] * (key_dim + v.shape[-1])


class _Softmax(Kernel):
    """
    Args:
        dropout: probability with which an attention weight is dropped in training.
    """

    def __init__(self, heads: int, key_dim: int, layout: Layout, *, dropout: float = 0.0) -> None:
        super().__init__(heads, key_dim, layout)
        check_share("dropout", dropout)
        self.dropout = dropout

    @property
    def dropout_now(self) -> float:
        return self.dropout if self.training else 0.0

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_layout: Layout,
        k_layout: Layout,
        bias: Tensor | None = None,
    ) -> int:
        return attend_flops(q, k, v)


@KERNELS.register("softmax")
class Softmax(_Softmax):
    """Fused (:func:`attend`): memory is linear in N and time is quadratic."""

    takes_bias = True

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_layout: Layout,
        k_layout: Layout,
        bias: Tensor | None = None,
    ) -> Tensor:
        return attend(q, k, v, bias, self.dropout_now)


@KERNELS.register("softmax_eager")
class SoftmaxEager(_Softmax):
    """Materialised: the N x M map is stored, as every implementation did in 2021."""

    takes_bias = True

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_layout: Layout,
        k_layout: Layout,
        bias: Tensor | None = None,
    ) -> Tensor:
        logits = q @ k.mT * self.key_dim**-0.5
        if bias is not None:
            logits = logits + bias
        return F.dropout(logits.softmax(-1), self.dropout_now) @ v
