"""Pixels to tokens: (B, C, *shape) -> (B, N, D) for signals, images and volumes."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .kernels.base import widened, without_autocast
from .layers import ACTIVATION, BATCH_NORM, CONV, MAX_POOL, ConvNorm, channels_last
from .layout import Layout
from .positions import SinCosPosition
from .registry import Registry, check_at_least, check_odd, unknown

_PATCHES = {
    1: "b c (l p0) -> b l (p0 c)",
    2: "b c (h p0) (w p1) -> b (h w) (p0 p1 c)",
    3: "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2 c)",
}


def check_input_shape(input_shape: tuple[int, ...]) -> None:
    """Raise a ValueError for what is not (C, *shape) of one to three axes."""
    if not 2 <= len(input_shape) <= 4 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape {input_shape} must be (channels, length), (channels, height, width) "
            "or (channels, depth, height, width), all at least 1"
        )


def patch_grid(
    input_shape: tuple[int, ...], patch: int | tuple[int, ...], ragged: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check (C, *shape) and patch; return the patch on each axis and the grid of patches.

    ``ragged``: the last patch of an axis may reach over the edge.
    """
    check_input_shape(input_shape)
    shape = input_shape[1:]
    sizes = (patch,) * len(shape) if isinstance(patch, int) else tuple(patch)
    if len(sizes) != len(shape) or min(sizes) < 1:
        raise ValueError(
            f"patch {patch} must be one positive size, or one for each axis of {tuple(shape)}"
        )
    for size, p in zip(shape, sizes, strict=True):
        if size % p and not ragged:
            near = sorted({max(p, size // p * p), -(-size // p) * p})
            raise ValueError(
                f"image size {'x'.join(map(str, shape))} is not divisible by patch {patch}: "
                f"{size} could be {' or '.join(map(str, near))}"
            )
    return sizes, tuple(-(-s // p) for s, p in zip(shape, sizes, strict=True))


def deal_strides(
    patch: tuple[int, ...], layers: int, pool_stride: int = 1
) -> list[tuple[int, ...]]:
    """Strides of ``layers`` convolutions that reach ``patch``, each followed by a pool.

    The prime factors of what the pools leave are dealt in turn, the largest first.

    >>> deal_strides((16,), 4), deal_strides((2,), 3), deal_strides((16,), 2, 2)
    ([(2,), (2,), (2,), (2,)], [(2,), (1,), (1,)], [(2,), (2,)])
    """
    strides = [[1] * len(patch) for _ in range(layers)]
    for axis, size in enumerate(patch):
        left, factors = size // pool_stride**layers, []
        if left * pool_stride**layers != size:
            raise ValueError(
                f"patch {size} is not a multiple of {pool_stride**layers}, to which {layers} "
                f"pool(s) of stride {pool_stride} come"
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


def _check_strides(patch: tuple[int, ...], strides: list[tuple[int, ...]], kernel: int) -> None:
    """Raise a ValueError for a convolution that would step over pixels it never reads."""
    widest = max(map(max, strides))
    if widest > kernel:
        raise ValueError(
            f"patch {patch} over {len(strides)} layer(s) needs a stride of {widest}, but a kernel "
            f"of {kernel} reads no farther: take more layers or another patch"
        )


class Stem(nn.Module):
    """Knows pixels; nothing after it does. Options are keyword-only constructor arguments.

    Args:
        input_shape: (C, *shape), one to three axes.
        patch: pixels for each token, one size or one for each axis.
        dim: token width D.

    Attributes:
        grid: number of tokens on each axis.
        prefix: tokens in front of those, without a place there.
    """

    prefix: int = 0
    ragged: ClassVar[bool] = False  # whether patches overlap, so that any size will do

    def __init__(
        self, input_shape: tuple[int, ...], patch: int | tuple[int, ...], dim: int
    ) -> None:
        super().__init__()
        self.patch, self.grid = patch_grid(input_shape, patch, self.ragged)


STEMS: Registry[Stem] = Registry("stem")


@STEMS.register("patch")
class PatchStem(Stem):
    """Flattened patches through one linear map (Dosovitskiy et al. 2020, eq. 1).

    A patch is flattened pixel by pixel, channels innermost.
    """

    def __init__(
        self, input_shape: tuple[int, ...], patch: int | tuple[int, ...], dim: int
    ) -> None:
        super().__init__(input_shape, patch, dim)
        self.patch_dim = input_shape[0] * math.prod(self.patch)
        self.proj = nn.Linear(self.patch_dim, dim)

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, prod(patch) * C)"""
        sizes = {f"p{axis}": size for axis, size in enumerate(self.patch)}
        return rearrange(x, _PATCHES[len(self.patch)], **sizes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(self.patches(x))
        return y


@STEMS.register("published")
class PublishedStem(PatchStem):
    """The stem of vision_xformer 0.1.6 to 0.2.0, for its checkpoints only.

    It normalises each patch first: at patch 1 that is over the channels of one pixel, which wipes
    out brightness and contrast (of a grey image, everything).
    """

    def __init__(
        self, input_shape: tuple[int, ...], patch: int | tuple[int, ...], dim: int
    ) -> None:
        super().__init__(input_shape, patch, dim)
        self.norm_in = nn.LayerNorm(self.patch_dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm_out(self.proj(self.norm_in(self.patches(x))))
        return y


@STEMS.register("fft")
class FourierStem(PublishedStem):
    """Patches of the picture, and in front of them patches of its Fourier transform.

    Real and imaginary parts are channels; both kinds of patches are normed before and after their
    map, and those of the transform bring sines for positions with them. (The SimpleViT with FFT of
    vit-pytorch.)

    Args:
        freq_patch: frequencies for each token, one number or one for each axis; by default as the
            patch.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch: int | tuple[int, ...],
        dim: int,
        *,
        freq_patch: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(input_shape, patch, dim)
        channels, *shape = input_shape
        freq = self.patch if freq_patch is None else freq_patch
        try:
            self.freq = PublishedStem((2 * channels, *shape), freq, dim)
        except ValueError as error:
            raise ValueError(f"freq_patch of stem 'fft': {error}") from None
        self.freq_position = SinCosPosition(Layout(self.freq.grid), dim)
        self.prefix = math.prod(self.freq.grid)

    def forward(self, x: Tensor) -> Tensor:
        # float16 cannot hold the sums; to the norm behind, their scale is all the same
        norm = "ortho" if x.dtype == torch.float16 else "backward"
        with without_autocast(x):
            waves = torch.fft.fftn(*widened(x), dim=tuple(range(2, x.ndim)), norm=norm)
            parts = torch.cat((waves.real, waves.imag), 1).to(x.dtype)
        freq = self.freq(parts) + self.freq_position()
        return torch.cat((freq, super().forward(x)), 1)


@STEMS.register("conv")
class ConvStem(Stem):
    """The hybrid stem (Jeevan & Sethi 2022, section 3): 3x3 convolutions, the last one to D.

    With patch p the last convolution has kernel p + 2 and stride p, so neighbouring tokens share
    a border of pixels; at p = 1 it is the paper's.

    Args:
        channels: output channels of the convolutions before the last.
        norm: "batch" after each of them, or None as in the paper.
        activation: "gelu" or "relu" after each of them, or None as in the paper.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch: int | tuple[int, ...],
        dim: int,
        *,
        channels: tuple[int, ...] = (32, 64),
        norm: str | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(input_shape, patch, dim)
        if norm not in (None, "batch"):
            raise ValueError(f"norm {norm!r} of stem 'conv' must be 'batch' or None")
        if activation is not None and activation not in ACTIVATION:
            raise unknown("activation of stem 'conv'", activation, ACTIVATION)
        if min(channels, default=1) < 1:
            raise ValueError(f"channels {list(channels)} of stem 'conv' must be at least 1")
        axes = len(self.grid)
        conv, width = CONV[axes], input_shape[0]
        layers: list[nn.Module] = []
        for out in channels:
            layers.append(conv(width, out, 3, padding=1, bias=norm is None))
            if norm is not None:
                layers.append(BATCH_NORM[axes](out))
            if activation is not None:
                layers.append(ACTIVATION[activation]())
            width = out
        kernel = tuple(p + 2 for p in self.patch)
        layers.append(conv(width, dim, kernel, stride=self.patch, padding=1))
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convs(channels_last(x))
        return y.flatten(2).mT


@STEMS.register("tokenizer")
class Tokenizer(Stem):
    """The convolutional tokenizer of CCT (Hassani et al. 2021, arXiv 2104.05704, section 3.3).

    ``layers`` times convolution without bias, max-pool over 3, ReLU. The patch is what all strides
    come to; those of the convolutions share what the pools leave of it, the first ones most.

    Args:
        kernel: of the convolutions, odd.
        layers: number of convolutions.
        channels: between them.
        pool_stride: of each pool; 1 keeps all places.
    """

    ragged = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch: int | tuple[int, ...],
        dim: int,
        *,
        kernel: int = 3,
        layers: int = 1,
        channels: int = 64,
        pool_stride: int = 2,
    ) -> None:
        super().__init__(input_shape, patch, dim)
        check_odd("kernel of stem 'tokenizer':", kernel)
        values = {"layers": layers, "channels": channels, "pool_stride": pool_stride}
        for name, value in values.items():
            check_at_least(f"{name} of stem 'tokenizer':", value, 1)
        axes = len(self.grid)
        strides = deal_strides(self.patch, layers, pool_stride)
        _check_strides(self.patch, strides, kernel)
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
        x = channels_last(x)
        for conv in self.convs:
            x = self.pool(conv(x)).relu()  # the same as before the pool, on fewer pixels
        return x.flatten(2).mT


@STEMS.register("levit")
class LeViTStem(Stem):
    """The stem of LeViT (Graham et al. 2021, arXiv 2104.01136, section 4.2).

    ``layers`` times 3x3 convolution and batch norm, hard-swish between them; each doubles the
    channels, up to D. The strides share the patch, the first ones most.

    Args:
        layers: number of convolutions; ``dim`` is a multiple of 2^(layers - 1).
    """

    ragged = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch: int | tuple[int, ...],
        dim: int,
        *,
        layers: int = 4,
    ) -> None:
        super().__init__(input_shape, patch, dim)
        check_at_least("layers of stem 'levit':", layers, 1)
        if dim % 2 ** (layers - 1):
            raise ValueError(
                f"dim {dim} must be a multiple of {2 ** (layers - 1)}: stem 'levit' of {layers} "
                "layers halves it that often"
            )
        widths = [input_shape[0], *(dim // 2**i for i in reversed(range(layers)))]
        strides = deal_strides(self.patch, layers)
        _check_strides(self.patch, strides, 3)
        self.convs = nn.ModuleList(
            ConvNorm(len(self.grid), width, out, 3, stride)
            for width, out, stride in zip(widths, widths[1:], strides, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.convs
        x = first(channels_last(x))
        for conv in rest:
            x = conv(F.hardswish(x))
        return x.flatten(2).mT
