"""Swin (Liu et al. 2021, arXiv 2103.14030): windows, shifted in every other block."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels.windowed import Windows
from ..layers import CONV
from ..mixers import Mixer
from ..stems import patch_grid
from .base import BACKBONES, Downsampling
from .pyramid import Pyramid, PyramidConfig, window_attention

_IMAGENET = dict(input_shape=(3, 224, 224), num_classes=1000, mixer_options={"qkv_bias": True})
_NEIGHBORS = {
    1: "b (l i) c -> b l (i c)",
    2: "b (h i) (w j) c -> b (h w) (i j c)",
    3: "b (t i) (h j) (w k) c -> b (t h w) (i j k c)",
}


class PatchMerging(Downsampling):
    """Concatenate neighbors, 2 on each axis, then norm and linear layer (section 3.1).

    Axes of odd length are padded with zeros.

    Shape: (B, N, D) -> (B, n, E)

    Args:
        axes: number of axes of the grid.
        dim: width D.
        out_dim: width E.
        norm_eps: epsilon of the layer norm.
    """

    def __init__(self, axes: int, dim: int, out_dim: int, norm_eps: float) -> None:
        super().__init__()
        neighbors = 2**axes
        self.stride = (2,) * axes
        self.norm = nn.LayerNorm(neighbors * dim, norm_eps)
        self.linear = nn.Linear(neighbors * dim, out_dim, bias=False)

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """Half the grid, rounded up."""
        return grid.strided(2)

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Halve the grid: (B, N, D) -> (B, n, E)."""
        shape = grid.shape
        x = x.unflatten(1, shape)
        if any(size % 2 for size in shape):
            x = F.pad(x, (0, 0, *(n for size in reversed(shape) for n in (0, size % 2))))
        pairs = dict(zip("ijk", [2] * len(shape), strict=False))
        return self.linear(self.norm(rearrange(x, _NEIGHBORS[len(shape)], **pairs)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinConfig(PyramidConfig):
    """Configuration of :class:`Swin`."""

    backbone: ClassVar[str] = "swin"


@BACKBONES.register("swin")
class Swin(Pyramid):
    """Swin; in every other block the windows are shifted by half their size.

    Shape: (B, C, *shape) -> (B, num_classes)

    Args:
        config: see :class:`SwinConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = SwinConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": _IMAGENET,
        "small": dict(depths=(2, 2, 18, 2), **_IMAGENET),
        "base": dict(
            dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32),
            **_IMAGENET,
        ),
    }  # fmt: skip

    def make_stem(self) -> nn.Module:
        """A convolution over patches, (B, C, *shape) -> (B, D, *grid)."""
        channels, *shape = self.config.input_shape
        patch_size, _ = patch_grid(self.config.input_shape, self.config.patch_size)
        return CONV[len(shape)](channels, self.config.dims[0], patch_size, patch_size)

    def make_merging(self, index: int, axes: int) -> Downsampling:
        """Patch merging, (B, N, D) -> (B, n, E)."""
        c = self.config
        return PatchMerging(axes, c.dims[index - 1], c.dims[index], c.norm_eps)

    def make_attention(self, index: int, odd: bool, grid: TokenGrid) -> Mixer:
        """Attention in windows, shifted in odd blocks: (B, N, D) -> (B, N, D)."""
        c = self.config
        return window_attention(
            c.mixer, c.mixer_options, dim=c.dims[index], heads=c.heads_of(index), grid=grid,
            windows=Windows(c.window, c.window // 2 if odd else 0), position_bias=c.position_bias,
        )  # fmt: skip
