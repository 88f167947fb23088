"""Depth-wise convolutions of the values, which many papers add to their attention.

They are options of attention, not of the kernels, so that their contribution can be measured apart.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels.base import merge_heads, split_heads
from ..layers import CONV

# Han et al. 2023 (agent attention), Han et al. 2023 (focused attention), Dong et al. 2021 (LePE)
LocalKind = Literal["dwc3", "dwc5", "lepe"]


class LocalValues(nn.Module):
    """A depth-wise convolution of the values over the grid; 0 for prefix tokens.

    Shape: (B, G, N, V) -> same

    Args:
        kind: "dwc3", 3 taps on each axis for each channel; "lepe", the same with 5 taps; or
            "dwc5", 5 taps for each channel of a head, shared by all heads.
        axes: number of axes of the grid.
        heads: number G of heads of the values.
        width: width per head V.
    """

    def __init__(self, kind: LocalKind, axes: int, heads: int, width: int) -> None:
        super().__init__()
        self.shared, taps = kind == "dwc5", 3 if kind == "dwc3" else 5
        channels = width if self.shared else heads * width
        self.conv = CONV[axes](
            channels, channels, taps, padding=taps // 2, groups=channels, bias=False
        )

    def forward(self, v: Tensor, grid: TokenGrid) -> Tensor:
        """Convolve: (B, G, N, V) -> same."""
        x = v.flatten(0, 1) if self.shared else merge_heads(v)
        image = x[:, grid.prefix :].mT.unflatten(2, grid.shape)
        y = F.pad(self.conv(image).flatten(2).mT, (0, 0, grid.prefix, 0))
        return y.unflatten(0, v.shape[:2]) if self.shared else split_heads(y, v.shape[1])
