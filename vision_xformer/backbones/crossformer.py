"""CrossFormer (Wang et al. 2021, arXiv 2108.00154) with any mixer that has queries and keys.

Patches of several sizes become tokens; short- and long-distance attention alternate.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..grid import TokenGrid, on_grid
from ..kernels.windowed import Windows
from ..layers import CONV
from ..mixers import Mixer
from ..stems import patch_grid
from .base import BACKBONES, Downsampling
from .pyramid import Pyramid, PyramidConfig, window_attention

_IMAGENET = dict(input_shape=(3, 224, 224), num_classes=1000, mixer_options={"qkv_bias": True})


class CrossScale(nn.Module):
    """Parallel convolutions of several kernel sizes and one stride (section 3.1).

    Each kernel but the last gets half of the remaining channels: large kernels are expensive.

    Shape: (B, C, *shape) -> (B, D, *shape / stride)

    Args:
        channels: number of input channels C.
        dim: number of output channels D.
        kernels: kernel sizes.
        stride: on each axis.
    """

    def __init__(
        self, channels: int, dim: int, kernels: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        last = len(kernels) - 1
        self.convs = nn.ModuleList(
            CONV[len(stride)](
                channels, dim // 2 ** min(i + 1, last), kernel, stride,
                tuple((kernel - s) // 2 for s in stride),
            )
            for i, kernel in enumerate(kernels)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Convolve: (B, C, *shape) -> (B, D, *shape / stride)."""
        return torch.cat([conv(x) for conv in self.convs], 1)


class CrossScaleMerging(Downsampling):
    """Layer norm, then :class:`CrossScale` over the grid. Shape: (B, N, D) -> (B, n, E).

    Args:
        axes: number of axes of the grid.
        dim: width D.
        out_dim: width E.
        kernels: kernel sizes.
        norm_eps: epsilon of the layer norm.
    """

    def __init__(
        self, axes: int, dim: int, out_dim: int, kernels: tuple[int, ...], norm_eps: float
    ) -> None:
        super().__init__()
        self.stride = (2,) * axes
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.merge = CrossScale(dim, out_dim, kernels, self.stride)

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """Half the grid."""
        return grid.strided(2)

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Halve the grid: (B, N, D) -> (B, n, E)."""
        return on_grid(self.merge, self.norm(x), grid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossFormerConfig(PyramidConfig):
    """Configuration of :class:`CrossFormer`: that of pyramids, kernel sizes and intervals.

    Args:
        stem_kernels: kernel sizes of the stem.
        merge_kernels: kernel sizes of the convolutions between stages.
        intervals: for each stage, the distance between tokens that attend to each other in a
            long-distance block; it must divide the grid. With 1, all tokens attend to each other.
    """

    backbone: ClassVar[str] = "crossformer"
    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (1, 1, 8, 6)
    heads: tuple[int, ...] | None = (2, 4, 8, 16)
    stem_kernels: tuple[int, ...] = (4, 8, 16, 32)
    merge_kernels: tuple[int, ...] = (2, 4)
    intervals: tuple[int, ...] = (8, 4, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stages(self.mixer, "intervals")
        if self.dynamic_size:
            raise ValueError(
                "CrossFormer's intervals are tied to one grid: dynamic_size must be False"
            )
        patch_size, shape = patch_grid(self.input_shape, self.patch_size)
        strides = {"stem_kernels": patch_size, "merge_kernels": (2,)}
        for name, stride in strides.items():
            kernels = getattr(self, name)
            fits = [k >= s and (k - s) % 2 == 0 for k in kernels for s in stride]
            if not kernels or not all(fits):
                raise ValueError(
                    f"{name} {kernels} must be at least the stride {stride} and exceed it by even "
                    "numbers"
                )
            dims = self.dims[:1] if name == "stem_kernels" else self.dims[1:]
            share = 2 ** (len(kernels) - 1)
            if any(dim % share for dim in dims):
                raise ValueError(
                    f"dims {self.dims} must be multiples of {share} for {name} {kernels}"
                )
        for stage, interval in enumerate(self.intervals, start=1):
            last = stage == len(self.dims)
            if any(g % interval or (g % 2 and not last) for g in shape):
                even = "" if last else " and even"
                raise ValueError(
                    f"stage {stage} has a grid of {shape} at input_shape {self.input_shape}: it "
                    f"must be a multiple of its interval, {interval}{even}"
                )
            shape = tuple(g // 2 for g in shape)


@BACKBONES.register("crossformer")
class CrossFormer(Pyramid):
    """CrossFormer; in every other block, attention is among tokens at an interval.

    The bias of each offset is predicted by a small network.

    Shape: (B, C, *shape) -> (B, num_classes)

    Args:
        config: see :class:`CrossFormerConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = CrossFormerConfig
    config: CrossFormerConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": _IMAGENET,
        "small": dict(
            dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24),
            **_IMAGENET,
        ),
        "base": dict(
            dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), heads=(3, 6, 12, 24),
            **_IMAGENET,
        ),
        "large": dict(
            dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32),
            **_IMAGENET,
        ),
    }  # fmt: skip

    def make_stem(self) -> nn.Module:
        """Parallel convolutions, (B, C, *shape) -> (B, D, *grid)."""
        c = self.config
        patch_size, _ = patch_grid(c.input_shape, c.patch_size)
        return CrossScale(c.input_shape[0], c.dims[0], c.stem_kernels, patch_size)

    def make_merging(self, index: int, axes: int) -> Downsampling:
        """Parallel convolutions over the grid, (B, N, D) -> (B, n, E)."""
        c = self.config
        return CrossScaleMerging(
            axes, c.dims[index - 1], c.dims[index], c.merge_kernels, c.norm_eps
        )

    def make_attention(self, index: int, odd: bool, grid: TokenGrid) -> Mixer:
        """Attention in windows, at an interval in odd blocks: (B, N, D) -> (B, N, D)."""
        c = self.config
        window, interval = c.window, 1
        if odd and min(grid.shape) > window:  # else one window is the whole grid
            interval = c.intervals[index]
            window = max(grid.shape) if interval == 1 else window
        return window_attention(
            c.mixer, c.mixer_options, dim=c.dims[index], heads=c.heads_of(index), grid=grid,
            windows=Windows(window, interval=interval), position_bias=c.position_bias,
            bias_dim=max(1, c.dims[index] // 16),
        )  # fmt: skip
