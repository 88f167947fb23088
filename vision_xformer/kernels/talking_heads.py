"""Talking-heads attention (Shazeer et al. 2020, arXiv 2003.02436).

Linear layers mix the heads of the map before and after the softmax. CaiT uses it (Touvron et al.
2021, arXiv 2103.17239).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import TokenGrid
from .base import KERNELS, Site
from .softmax import MapKernel, attend_flops


def _mix(layer: nn.Linear, maps: Tensor) -> Tensor:
    """(B, H, N, M) -> same: the layer over heads, without moving the maps in memory.

    Calling the layer on unit vectors and on zero gives its matrix and bias. The vectors are scaled,
    or else half precision would lose small weights when the bias is subtracted.
    """
    scale = 2.0**8
    unit = torch.eye(maps.shape[1], dtype=maps.dtype, device=maps.device) * scale
    columns, bias = layer(F.pad(unit, (0, 0, 0, 1))).split((len(unit), 1))
    weight = ((columns - bias) / scale).mT.expand(maps.shape[0], -1, -1)
    return torch.baddbmm(bias.mT, weight, maps.flatten(2)).view_as(maps)


@KERNELS.register("talking_heads")
class TalkingHeads(MapKernel):
    """Softmax attention whose heads are mixed before and after the softmax; the map is stored.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, site: Site, *, dropout: float = 0.0) -> None:
        super().__init__(site, dropout=dropout)
        self.before, self.after = (nn.Linear(site.heads, site.heads) for _ in range(2))

    def start_from_softmax(self) -> None:
        """Initialize without mixing of heads."""
        for layer in (self.before, self.after):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

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
        logits = _mix(self.before, (q * self.site.key_dim**-0.5) @ k.mT)
        maps = _mix(self.after, logits.softmax(-1))
        return F.dropout(maps, self.dropout_now) @ v

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 N M (K + V) for each head and 4 N M H^2 for mixing heads twice."""
        mixing = 4 * q.shape[0] * self.site.heads**2 * q.shape[-2] * k.shape[-2]
        return attend_flops(q, k, v) + mixing
