"""Convolutional stems: the hybrid stem, the tokenizer of CCT, and the stem of LeViT."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..layers import ACTIVATION, BATCH_NORM, CONV, MAX_POOL, Activation, ConvNorm, channels_last
from ..options import check_at_least, check_odd
from .base import STEMS, Stem


def distribute_strides(
    patch_size: tuple[int, ...], layers: int, pool_stride: int = 1
) -> list[tuple[int, ...]]:
    """Strides of ``layers`` convolutions, each followed by a pool, whose product is the patch size.

    The prime factors that the pools leave are assigned in turn, starting with the largest.

    >>> distribute_strides((16,), 4), distribute_strides((2,), 3), distribute_strides((16,), 2, 2)
    ([(2,), (2,), (2,), (2,)], [(2,), (1,), (1,)], [(2,), (2,)])

    Raises:
        ValueError: for a patch size that is not a multiple of the strides of the pools.
    """
    strides = [[1] * len(patch_size) for _ in range(layers)]
    for axis, size in enumerate(patch_size):
        left, factors = size // pool_stride**layers, []
        if left * pool_stride**layers != size:
            raise ValueError(
                f"patch_size {size} is not a multiple of {pool_stride**layers}, the total stride "
                f"of {layers} pool(s) of stride {pool_stride}"
            )
        prime = 2
        while left > 1:
            if prime * prime > left:
                prime = left
            while left % prime == 0:
                factors.append(prime)
                left //= prime
            prime += 1
        for turn, factor in enumerate(reversed(factors)):
            strides[turn % layers][axis] *= factor
    return [tuple(s) for s in strides]


def _check_strides(
    patch_size: tuple[int, ...], strides: list[tuple[int, ...]], kernel: int
) -> None:
    """Raise a ValueError for a convolution whose stride exceeds its kernel."""
    widest = max(map(max, strides))
    if widest > kernel:
        raise ValueError(
            f"patch_size {patch_size} over {len(strides)} layer(s) needs a stride of {widest}, "
            f"more than the kernel of {kernel}: use more layers or another patch_size"
        )


@STEMS.register("conv")
class ConvStem(Stem):
    """The hybrid stem (Jeevan & Sethi 2022, section 3): 3x3 convolutions, the last one to D.

    With patch size p the last convolution has kernel p + 2 and stride p, so neighboring tokens
    share a border of pixels; at p = 1 it is that of the paper.

    Shape: (B, C, *shape) -> (B, N, D)

    Args:
        input_shape: (C, *shape), one to three axes.
        patch_size: pixels per token, one size or one for each axis.
        dim: token width D.
        channels: output channels of the convolutions before the last.
        norm: "batch" after each of them, or None as in the paper.
        activation: "gelu" or "relu" after each of them, or None as in the paper.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch_size: int | tuple[int, ...],
        dim: int,
        *,
        channels: tuple[int, ...] = (32, 64),
        norm: Literal["batch"] | None = None,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(input_shape, patch_size, dim)
        if min(channels, default=1) < 1:
            raise ValueError(f"channels {list(channels)} of stem 'conv' must be at least 1")
        axes = len(self.grid.shape)
        conv, width = CONV[axes], input_shape[0]
        layers: list[nn.Module] = []
        for out in channels:
            layers.append(conv(width, out, 3, padding=1, bias=norm is None))
            if norm is not None:
                layers.append(BATCH_NORM[axes](out))
            if activation is not None:
                layers.append(ACTIVATION[activation]())
            width = out
        kernel = tuple(p + 2 for p in self.patch_size)
        layers.append(conv(width, dim, kernel, stride=self.patch_size, padding=1))
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve: (B, C, *shape) -> (B, N, D)."""
        return self.convs(channels_last(x)).flatten(2).mT


@STEMS.register("tokenizer")
class Tokenizer(Stem):
    """The convolutional tokenizer of CCT (Hassani et al. 2021, arXiv 2104.05704, section 3.3).

    Each of ``layers`` layers is a convolution without bias, a max-pool of size 3, and ReLU. The
    patch size is the product of all strides; :func:`distribute_strides` sets the convolutions'.

    Shape: (B, C, *shape) -> (B, N, D)

    Args:
        input_shape: (C, *shape), one to three axes.
        patch_size: pixels per token, one size or one for each axis.
        dim: token width D.
        kernel: kernel size of the convolutions, odd.
        layers: number of convolutions.
        channels: number of channels between them.
        pool_stride: stride of each pool; 1 keeps all positions.
    """

    ragged = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch_size: int | tuple[int, ...],
        dim: int,
        *,
        kernel: int = 3,
        layers: int = 1,
        channels: int = 64,
        pool_stride: int = 2,
    ) -> None:
        super().__init__(input_shape, patch_size, dim)
        check_odd("kernel of stem 'tokenizer':", kernel)
        values = {"layers": layers, "channels": channels, "pool_stride": pool_stride}
        for name, value in values.items():
            check_at_least(f"{name} of stem 'tokenizer':", value, 1)
        axes = len(self.grid.shape)
        strides = distribute_strides(self.patch_size, layers, pool_stride)
        _check_strides(self.patch_size, strides, kernel)
        widths = [input_shape[0], *(channels for _ in range(layers - 1)), dim]
        convs = [
            CONV[axes](width, out, kernel, stride, kernel // 2, bias=False)
            for width, out, stride in zip(widths, widths[1:], strides, strict=False)
        ]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight)
        self.convs = nn.ModuleList(convs)
        self.pool = MAX_POOL[axes](3, pool_stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and pool: (B, C, *shape) -> (B, N, D)."""
        x = channels_last(x)
        for conv in self.convs:
            x = self.pool(conv(x)).relu()  # relu commutes with max-pool and is cheaper afterwards
        return x.flatten(2).mT


@STEMS.register("levit")
class LeViTStem(Stem):
    """The stem of LeViT (Graham et al. 2021, arXiv 2104.01136, section 4.2).

    Each of ``layers`` layers is a 3x3 convolution with batch norm, with an activation between
    layers: hard-swish, or GELU as in XCiT. Each doubles the channels, up to D. The product of the
    strides is the patch size.

    Shape: (B, C, *shape) -> (B, N, D)

    Args:
        input_shape: (C, *shape), one to three axes.
        patch_size: pixels per token, one size or one for each axis.
        dim: token width D.
        layers: number of convolutions; ``dim`` is a multiple of 2^(layers - 1).
        activation: "hardswish" or "gelu", between the layers.
    """

    ragged = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch_size: int | tuple[int, ...],
        dim: int,
        *,
        layers: int = 4,
        activation: Literal["hardswish", "gelu"] = "hardswish",
    ) -> None:
        super().__init__(input_shape, patch_size, dim)
        check_at_least("layers of stem 'levit':", layers, 1)
        if dim % 2 ** (layers - 1):
            raise ValueError(
                f"dim {dim} must be a multiple of {2 ** (layers - 1)}: stem 'levit' of {layers} "
                "layers halves it that often"
            )
        widths = [input_shape[0], *(dim // 2**i for i in reversed(range(layers)))]
        strides = distribute_strides(self.patch_size, layers)
        _check_strides(self.patch_size, strides, 3)
        self.convs = nn.ModuleList(
            ConvNorm(len(self.grid.shape), width, out, 3, stride)
            for width, out, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.activation = nn.GELU() if activation == "gelu" else nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve: (B, C, *shape) -> (B, N, D)."""
        first, *rest = self.convs
        x = first(channels_last(x))
        for conv in rest:
            x = conv(self.activation(x))
        return x.flatten(2).mT
