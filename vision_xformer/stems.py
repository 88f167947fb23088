"""Pixels to tokens: (B, C, *shape) -> (B, N, D) for signals, images and volumes."""

from __future__ import annotations

import math
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from .registry import Registry, unknown

_PATCHES = {
    1: "b c (l p0) -> b l (p0 c)",
    2: "b c (h p0) (w p1) -> b (h w) (p0 p1 c)",
    3: "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2 c)",
}
_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_ACTIVATION = {"gelu": nn.GELU, "relu": nn.ReLU}


def patch_grid(
    input_shape: tuple[int, ...], patch: int | tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check (C, *shape) and patch; return the patch on each axis and the grid of patches."""
    shape = input_shape[1:]
    if not 1 <= len(shape) <= 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape {input_shape} must be (channels, length), (channels, height, width) "
            "or (channels, depth, height, width), all at least 1"
        )
    sizes = (patch,) * len(shape) if isinstance(patch, int) else tuple(patch)
    if len(sizes) != len(shape) or min(sizes) < 1:
        raise ValueError(
            f"patch {patch} must be one positive size, or one for each axis of {tuple(shape)}"
        )
    for size, p in zip(shape, sizes, strict=True):
        if size % p:
            near = sorted({max(p, size // p * p), -(-size // p) * p})
            raise ValueError(
                f"image size {'x'.join(map(str, shape))} is not divisible by patch {patch}: "
                f"{size} could be {' or '.join(map(str, near))}"
            )
    return sizes, tuple(s // p for s, p in zip(shape, sizes, strict=True))


class Stem(nn.Module):
    """Knows pixels; nothing after it does. Options are keyword-only constructor arguments.

    Args:
        input_shape: (C, *shape), one to three axes.
        patch: pixels for each token, one size or one for each axis.
        dim: token width D.

    Attributes:
        grid: number of tokens on each axis.
    """

    def __init__(
        self, input_shape: tuple[int, ...], patch: int | tuple[int, ...], dim: int
    ) -> None:
        super().__init__()
        self.patch, self.grid = patch_grid(input_shape, patch)


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
        if activation is not None and activation not in _ACTIVATION:
            raise unknown("activation of stem 'conv'", activation, _ACTIVATION)
        if min(channels, default=1) < 1:
            raise ValueError(f"channels {list(channels)} of stem 'conv' must be at least 1")
        axes = len(self.grid)
        conv, width = _CONV[axes], input_shape[0]
        layers: list[nn.Module] = []
        for out in channels:
            layers.append(conv(width, out, 3, padding=1, bias=norm is None))
            if norm is not None:
                layers.append(_BATCH_NORM[axes](out))
            if activation is not None:
                layers.append(_ACTIVATION[activation]())
            width = out
        kernel = tuple(p + 2 for p in self.patch)
        layers.append(conv(width, dim, kernel, stride=self.patch, padding=1))
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convs(x)
        return y.flatten(2).mT
