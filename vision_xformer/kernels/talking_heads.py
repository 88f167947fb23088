"""Talking-heads attention (Shazeer et al. 2020, arXiv 2003.02436; in CaiT, Touvron et al. 2021,
arXiv 2103.17239): heads are mixed by a linear map before the softmax and by another after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Layout
from .base import KERNELS
from .softmax import _Softmax, attend_flops


def _mix(heads: nn.Linear, maps: Tensor) -> Tensor:
    """(B, H, N, M) -> same, as one product: the maps stay as they lie."""
    weight = heads.weight.expand(maps.shape[0], -1, -1)
    return torch.baddbmm(heads.bias[:, None], weight, maps.flatten(2)).view_as(maps)


@KERNELS.register("talking_heads")
class TalkingHeads(_Softmax):
    """The N x M map is stored."""

    def __init__(self, heads: int, key_dim: int, layout: Layout, *, dropout: float = 0.0) -> None:
        super().__init__(heads, key_dim, layout, dropout=dropout)
        self.before, self.after = (nn.Linear(heads, heads) for _ in range(2))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
    ) -> Tensor:
        logits = _mix(self.before, (q * self.key_dim**-0.5) @ k.mT)
        maps = _mix(self.after, logits.softmax(-1))
        return F.dropout(maps, self.dropout_now) @ v

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_layout: Layout,
        k_layout: Layout,
        bias: Tensor | None = None,
    ) -> int:
        """2 N M (K + V) for each head and 4 N M H^2 for the two mixings."""
        mixing = 4 * q.shape[0] * self.heads**2 * q.shape[-2] * k.shape[-2]
        return attend_flops(q, k, v) + mixing
