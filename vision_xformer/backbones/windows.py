"""Pyramids of attention in windows, with any mixer that has queries and keys: Swin (Liu et al.
2021, arXiv 2103.14030) and CrossFormer (Wang et al. 2021, arXiv 2108.00154).

Pixels -> tokens -> stages of blocks, every second one between the windows of the one before, a map
that halves the grid between them -> norm -> mean -> head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import CONV
from ..layout import Layout
from ..mixers import WindowSlot, create_mixer, takes_heads
from ..projections import on_grid
from ..registry import check_at_least
from ..stems import patch_grid
from .base import BACKBONES, Backbone, Block, Config, check_stages, drop_paths, init_linears

_IMAGENET = dict(
    input_shape=(3, 224, 224), num_classes=1000, mixer_options={"qkv_bias": True}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidConfig(Config):
    """
    Args:
        patch: pixels for each token of the first stage, one size or one for each axis.
        dims, depths, heads: width D, number of blocks and heads of each stage; heads is None for a
            mixer without heads, which no window can hold as yet.
        window: tokens of a window on each axis. Where a grid is no multiple of it the last window
            is smaller; the authors of Swin, and timm, add zeros there instead.
        mlp_ratio: hidden width of the MLPs for a width of 1.
        mixer, mixer_options: token mixer by name and its options.
        position_bias: whether logits get a bias for each offset; False for a mixer that forms no
            attention map.
        dropout: in the MLP. drop_path: stochastic depth of the last block, rising linearly from 0
            at the first. A mixer's dropout is its option.
        norm_eps: epsilon of the layer norms.
    """

    patch: int | tuple[int, ...] = 4
    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] | None = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: int = 4
    mixer: str = "softmax"
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    position_bias: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self, ["dims", "depths", *(["heads"] if takes_heads(self.mixer) else [])])
        check_at_least("window", self.window, 1)
        check_at_least("mlp_ratio", self.mlp_ratio, 1)


class Pyramid(Backbone):
    """What the two have in common; they say how pixels and stages become tokens, and where
    attention looks.
    """

    config: PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dims[-1]
        _, grid = patch_grid(c.input_shape, c.patch)
        self.stem = self.make_stem()
        self.stem_norm = nn.LayerNorm(c.dims[0], c.norm_eps)
        rates = iter(drop_paths(c.drop_path, sum(c.depths)))
        stages, merges, self.layouts = [], [], []
        for index, (dim, depth) in enumerate(zip(c.dims, c.depths, strict=True)):
            heads = None if c.heads is None else c.heads[index]
            if index:
                merges.append(self.make_merge(index, len(grid)))
                grid = tuple(-(-g // 2) for g in grid)
            layout = Layout(grid)
            make = functools.partial(
                create_mixer, c.mixer, dim=dim, heads=heads, layout=layout, **c.mixer_options
            )
            stages.append(
                nn.ModuleList(
                    Block(
                        make(slot=self.slot(index, number % 2, grid)),
                        c.mlp_ratio * dim,
                        dropout=c.dropout,
                        drop_path=next(rates),
                        layer_scale=None,
                        norm_eps=c.norm_eps,
                    )
                    for number in range(depth)
                )
            )
            self.layouts.append(layout)
        self.stages, self.merges = nn.ModuleList(stages), nn.ModuleList(merges)
        init_linears(self.stages)
        self.norm = nn.LayerNorm(c.dims[-1], c.norm_eps)
        self.head = self.make_head(c.num_classes)

    def make_stem(self) -> nn.Module:
        """(B, C, *shape) -> (B, D, *grid)"""
        raise NotImplementedError

    def make_merge(self, index: int, axes: int) -> nn.Module:
        """The map (B, N, D), layout -> (B, n, E) before a stage."""
        raise NotImplementedError

    def slot(self, index: int, odd: int, grid: tuple[int, ...]) -> WindowSlot:
        """Where an even or odd block of the stage looks."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, D), N and D those of the last stage."""
        self.check_input(x)
        x = self.stem_norm(self.stem(x).flatten(2).mT)
        for index, (stage, layout) in enumerate(zip(self.stages, self.layouts, strict=True)):
            if index:
                x = self.merges[index - 1](x, self.layouts[index - 1])
            for block in stage.children():
                x = self.run(block, x, layout, None)
        y: Tensor = self.norm(x)
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes); the pooled (B, D) with ``pre_logits``."""
        x = x.mean(1)
        y: Tensor = x if pre_logits else self.head(x)
        return y


class PatchMerging(nn.Module):
    """The tokens of 2 x 2 places side by side, normed and mapped (Swin, section 3.1): (B, N, D) ->
    (B, n, E). Where a side is odd, zeros are added.
    """

    def __init__(self, axes: int, dim: int, out_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2**axes * dim, norm_eps)
        self.linear = nn.Linear(2**axes * dim, out_dim, bias=False)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x.unflatten(1, layout.grid)
        if any(g % 2 for g in layout.grid):
            x = F.pad(x, (0, 0, *(n for g in reversed(layout.grid) for n in (0, g % 2))))
        axes = len(layout.grid)
        for axis in reversed(range(axes)):
            x = x.unflatten(1 + axis, (-1, 2))
        cells, pairs = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
        x = x.permute(0, *cells, *pairs, 2 * axes + 1).flatten(axes + 1).flatten(1, axes)
        y: Tensor = self.linear(self.norm(x))
        return y


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinConfig(PyramidConfig):
    """Swin."""

    backbone: ClassVar[str] = "swin"


@BACKBONES.register("swin")
class Swin(Pyramid):
    """Every second block's windows are shifted by half of one.

    Args:
        config: see :class:`PyramidConfig`.
    """

    config_class = SwinConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": dict(
            input_shape=(3, 20, 28), num_classes=5, patch=2, dims=(12, 20), depths=(2, 2),
            heads=(2, 5), window=3, mlp_ratio=2,
        ),
        "tiny": _IMAGENET,
        "small": dict(depths=(2, 2, 18, 2), **_IMAGENET),
        "base": dict(
            dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32),
            **_IMAGENET,
        ),
    }  # fmt: skip

    def make_stem(self) -> nn.Module:
        channels, *shape = self.config.input_shape
        patch, _ = patch_grid(self.config.input_shape, self.config.patch)
        conv: nn.Module = CONV[len(shape)](channels, self.config.dims[0], patch, patch)
        return conv

    def make_merge(self, index: int, axes: int) -> nn.Module:
        c = self.config
        return PatchMerging(axes, c.dims[index - 1], c.dims[index], c.norm_eps)

    def slot(self, index: int, odd: int, grid: tuple[int, ...]) -> WindowSlot:
        c = self.config
        shift = odd * (c.window // 2)
        return WindowSlot(c.window, shift, position_bias=c.position_bias)


class CrossScale(nn.Module):
    """Convolutions of several kernels and one stride, side by side (CrossFormer, section 3.1):
    (B, C, *shape) -> (B, D, *shape / stride).

    Each but the last gives half of the channels that are left: wide kernels are dear.
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
        return torch.cat([conv(x) for conv in self.convs], 1)


class CrossScaleMerging(nn.Module):
    """A norm, then :class:`CrossScale` over the grid: (B, N, D) -> (B, n, E)."""

    def __init__(
        self, axes: int, dim: int, out_dim: int, kernels: tuple[int, ...], norm_eps: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.merge = CrossScale(dim, out_dim, kernels, (2,) * axes)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return on_grid(self.merge, self.norm(x), layout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossFormerConfig(PyramidConfig):
    """As :class:`PyramidConfig`, and:

    Args:
        stem_kernels: of the convolutions that make tokens of pixels.
        merge_kernels: of those between stages.
        intervals: of each stage, between the tokens that a long-distance block joins; it divides
            the grid. With 1 that is all tokens.
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
        check_stages(self, ["intervals"])
        patch, grid = patch_grid(self.input_shape, self.patch)
        strides = {"stem_kernels": patch, "merge_kernels": (2,)}
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
            if any(g % interval or (g % 2 and not last) for g in grid):
                even = "" if last else " and even"
                raise ValueError(
                    f"stage {stage} has a grid of {grid} at input_shape {self.input_shape}: it "
                    f"must be a multiple of its interval, {interval}{even}"
                )
            grid = tuple(g // 2 for g in grid)


@BACKBONES.register("crossformer")
class CrossFormer(Pyramid):
    """Every second block looks at tokens at an interval; offsets get their bias of a small network.

    Args:
        config: see :class:`CrossFormerConfig`.
    """

    config_class = CrossFormerConfig
    config: CrossFormerConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": dict(
            input_shape=(3, 16, 24), num_classes=5, patch=2, dims=(32, 48), depths=(2, 2),
            heads=(2, 3), window=3, mlp_ratio=2, stem_kernels=(2, 4), merge_kernels=(2, 4),
            intervals=(4, 2),
        ),
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
        c = self.config
        patch, _ = patch_grid(c.input_shape, c.patch)
        return CrossScale(c.input_shape[0], c.dims[0], c.stem_kernels, patch)

    def make_merge(self, index: int, axes: int) -> nn.Module:
        c = self.config
        return CrossScaleMerging(
            axes, c.dims[index - 1], c.dims[index], c.merge_kernels, c.norm_eps
        )

    def slot(self, index: int, odd: int, grid: tuple[int, ...]) -> WindowSlot:
        c = self.config
        window, interval = c.window, 1
        if odd and min(grid) > window:  # else a window is all there is
            interval = c.intervals[index]
            window = max(grid) if interval == 1 else window
        return WindowSlot(
            window,
            interval=interval,
            bias_dim=max(1, c.dims[index] // 16),
            position_bias=c.position_bias,
        )
