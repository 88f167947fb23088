"""Tokens to queries, keys and values: where the backbones' attentions differ from each other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LinearProjection(nn.Module):
    """One linear map to q, k and v, (B, N, D) -> widths of (B, N, width), as in ViT.

    Args:
        dim: input width D.
        widths: of q, k and v; of q and k where the values are the keys.
        bias: whether the map adds one.
    """

    def __init__(self, dim: int, widths: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.widths = widths
        self.qkv = nn.Linear(dim, sum(widths), bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, *v = self.qkv(x).split(self.widths, -1)
        return q, k, v[0] if v else k

    def forward_each(self, xs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> list[Tensor]:
        """Project q, k[, v] from an x of its own: (B, R, D) -> (B, R, width).

        Each x is a weighted sum over tokens, and its bias is multiplied by the sum of the weights,
        (1, R, 1): the result is that of projecting first and summing after.
        """
        matrices = self.qkv.weight.split(self.widths)
        projected = [F.linear(x, m) for x, m in zip(xs, matrices, strict=False)]
        if self.qkv.bias is not None:
            biases = self.qkv.bias.split(self.widths)
            projected = [p + w * b for p, w, b in zip(projected, weights, biases, strict=False)]
        return projected
