"""Tokens to queries, keys and values: where the backbones' attentions differ from each other."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNorm, LinearNorm
from .layout import Layout, take_strided


def on_grid(conv: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """A convolution over the grid; the prefix passes it by: (B, N, D) -> (B, n, E)."""
    # The transposed view is a picture with channels last: nothing is copied.
    grid = x[:, layout.prefix :].mT.unflatten(2, layout.grid)
    y: Tensor = conv(grid).flatten(2).mT
    return torch.cat((x[:, : layout.prefix], y), 1) if layout.prefix else y


class Projection(nn.Module):
    """Tokens (B, N, D) to q, k and v, widths of (B, n, width); v is k where there are two widths.

    Attributes:
        ends_linear: whether it is :meth:`forward_each` of :meth:`inputs`, so that sums over tokens
            may be taken between the two.
    """

    ends_linear: ClassVar[bool] = False

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def inputs(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """What q, k and v are linear maps of."""
        raise NotImplementedError

    def forward_each(
        self, xs: tuple[Tensor, ...], sums: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project q, k and v each from an x of its own: (B, R, D) -> (B, R, width).

        Where an x holds weighted sums over tokens, ``sums`` are those of the weights, (1, R, 1),
        and multiply the bias: the result is that of projecting first and summing after.
        """
        raise NotImplementedError


class LinearProjection(Projection):
    """One linear map to q, k and v, as in ViT.

    Args:
        dim: input width D.
        widths: of q, k and v; of q and k where the values are the keys.
        bias: whether the map adds one.
    """

    ends_linear = True

    def __init__(self, dim: int, widths: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.widths = widths
        self.qkv = nn.Linear(dim, sum(widths), bias=bias)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        q, k, *v = self.qkv(x).split(self.widths, -1)
        return q, k, v[0] if v else k

    def inputs(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        return x, x, x

    def maps(self) -> list[tuple[Tensor, Tensor | None]]:
        """Matrix and bias of q, k and v."""
        biases = [None] * 3 if self.qkv.bias is None else self.qkv.bias.split(self.widths)
        return list(zip(self.qkv.weight.split(self.widths), biases, strict=False))

    def forward_each(
        self, xs: tuple[Tensor, ...], sums: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.maps()
        if sums is None:
            q, k, *v = (F.linear(x, w, b) for x, (w, b) in zip(xs, maps, strict=False))
        else:
            each = zip(xs, maps, sums, strict=False)
            q, k, *v = (F.linear(x, w) + (0 if b is None else s * b) for x, (w, b), s in each)
        return q, k, v[0] if v else k


class ClassProjection(LinearProjection):
    """The query of the first token alone, keys and values of all (CaiT, Touvron et al. 2021)."""

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        return self.forward_each(self.inputs(x, layout))

    def inputs(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        return x[:, :1], x, x


class ConvProjection(LinearProjection):
    """A depth-wise convolution with batch norm before each of q, k and v (CvT, Wu et al. 2021).

    Prefix tokens pass the convolutions by. Keys and values are taken at every ``kv_stride``-th
    place. q is divided by the square root of the number of heads: with the kernels' 1/sqrt(K)
    the logits are scaled by 1/sqrt(D), as the authors do.

    Args:
        layout: where the N tokens lie.
        heads: number of heads.
        kernel: width of the convolutions, odd.
        kv_stride: of keys and values.
    """

    def __init__(
        self,
        dim: int,
        widths: tuple[int, ...],
        bias: bool,
        layout: Layout,
        heads: int,
        kernel: int,
        kv_stride: int,
    ) -> None:
        super().__init__(dim, widths, bias)
        self.q_scale = heads**-0.5
        self.convs = nn.ModuleList(
            ConvNorm(len(layout.grid), dim, dim, kernel, stride, groups=dim)
            for stride in (1, kv_stride, kv_stride)[: len(widths)]
        )

    def inputs(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        q, k, *v = (on_grid(conv, x, layout) for conv in self.convs)
        return q, k, v[0] if v else k

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        return self.forward_each(self.inputs(x, layout))

    def maps(self) -> list[tuple[Tensor, Tensor | None]]:
        (w, b), *rest = super().maps()
        return [(w * self.q_scale, None if b is None else b * self.q_scale), *rest]


class NormProjection(Projection):
    """Linear maps to q, k and v, each followed by batch norm (LeViT, Graham et al. 2021).

    Args:
        dim: input width D.
        widths: of q, k and v; of q and k where the values are the keys.
        stride: queries are taken at every ``stride``-th place.
    """

    def __init__(self, dim: int, widths: tuple[int, ...], stride: int) -> None:
        super().__init__()
        self.widths, self.stride = widths, stride
        if stride == 1:
            self.qkv = LinearNorm(dim, sum(widths))
        else:
            self.q = LinearNorm(dim, widths[0])
            self.kv = LinearNorm(dim, sum(widths[1:]))

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        if self.stride == 1:
            q, k, *v = self.qkv(x).split(self.widths, -1)
        else:
            q = self.q(take_strided(x, layout, self.stride))
            k, *v = self.kv(x).split(self.widths[1:], -1)
        return q, k, v[0] if v else k
