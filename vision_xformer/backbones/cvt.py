"""Convolutional vision transformer CvT (Wu et al. 2021, arXiv 2103.15808) with any mixer.

Pixels -> stages of (overlapping convolutional embedding -> blocks), the last one with a class token
-> norm -> head. No positions: the convolutions know places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers import CONV, channels_last
from ..layout import Layout
from ..mixers import ConvSlot, create_mixer, takes_heads
from ..registry import check_at_least
from ..stems import check_input_shape
from .base import (
    BACKBONES,
    Backbone,
    Block,
    Config,
    check_prefix,
    check_stages,
    drop_paths,
    init_linears,
    make_rope,
)

_IMAGENET = dict(
    input_shape=(3, 224, 224), num_classes=1000, mixer_options={"qkv_bias": True}, drop_path=0.1
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CvTConfig(Config):
    """
    Args:
        dims, depths, heads: width D, number of blocks and heads of each stage; heads is None for a
            mixer without heads.
        embed_kernels, embed_strides: of the convolution that begins each stage.
        kernel: width of the depth-wise convolutions before q, k and v, odd.
        kv_stride: of keys and values, where the mixer has them.
        mlp_ratio: hidden width of the MLPs for a width of 1.
        mixer, mixer_options: token mixer by name and its options.
        class_token: whether the last stage has one, from which the head reads; else from the mean.
        rope: rotary positions, "axial" or "raster", or None.
        dropout: in the MLP. drop_path: stochastic depth of the last block, rising linearly from 0
            at the first. A mixer's dropout is its option.
        norm_eps: epsilon of the layer norms.
    """

    backbone: ClassVar[str] = "cvt"
    dims: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] | None = (1, 3, 6)
    embed_kernels: tuple[int, ...] = (7, 3, 3)
    embed_strides: tuple[int, ...] = (4, 2, 2)
    kernel: int = 3
    kv_stride: int = 2
    mlp_ratio: int = 4
    mixer: str = "softmax"
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_token: bool = True
    rope: str | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_input_shape(self.input_shape)
        names = ["dims", "depths", "embed_kernels", "embed_strides"]
        if takes_heads(self.mixer):
            names.append("heads")
        elif self.heads is not None:
            raise ValueError(f"mixer {self.mixer!r} has no heads: heads must be None")
        check_stages(self, names)
        for kernel, stride in zip(self.embed_kernels, self.embed_strides, strict=True):
            check_at_least(f"with embed_stride {stride} embed_kernel", kernel, stride)
        self.slot()
        check_at_least("mlp_ratio", self.mlp_ratio, 1)

    def slot(self) -> ConvSlot:
        """What the blocks ask of their mixers."""
        return ConvSlot(self.kernel, self.kv_stride)


class CvTStage(nn.Module):
    """Convolutional embedding, class token, blocks: (B, C, *grid) -> (B, N, D).

    It calls its blocks through ``run``, see :meth:`Backbone.run`.

    Attributes:
        layout: of its tokens.
    """

    cls_token: nn.Parameter | None

    def __init__(self, config: CvTConfig, index: int, channels: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        c, dim = config, config.dims[index]
        kernel, stride = c.embed_kernels[index], c.embed_strides[index]
        padding = (kernel - stride + 1) // 2
        self.embed = CONV[len(grid)](channels, dim, kernel, stride, padding)
        self.embed_norm = nn.LayerNorm(dim, c.norm_eps)
        has_token = c.class_token and index == len(c.dims) - 1
        token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if has_token else None
        self.register_parameter("cls_token", token)
        shape, grid = grid, tuple((g + 2 * padding - kernel) // stride + 1 for g in grid)
        if min(grid) < 1:
            raise ValueError(
                f"a grid of {shape} is too small for embed_kernel {kernel}, embed_stride {stride}"
            )
        self.layout = Layout(grid, int(has_token))
        mixers = [
            create_mixer(
                c.mixer,
                dim=dim,
                heads=None if c.heads is None else c.heads[index],
                layout=self.layout,
                slot=c.slot(),
                **c.mixer_options,
            )
            for _ in range(c.depths[index])
        ]
        before = sum(c.depths[:index])
        rates = drop_paths(c.drop_path, sum(c.depths))[before : before + c.depths[index]]
        self.blocks = nn.ModuleList(
            Block(
                mixer,
                c.mlp_ratio * dim,
                dropout=c.dropout,
                drop_path=rate,
                layer_scale=None,
                norm_eps=c.norm_eps,
            )
            for mixer, rate in zip(mixers, rates, strict=True)
        )
        self.rope = make_rope(c.rope, mixers[0], c.mixer)
        if has_token:
            check_prefix(self.blocks, c.mixer, "class_token must be False")

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        x = self.embed_norm(self.embed(x).flatten(2).mT)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        rope = None if self.rope is None else self.rope()
        for block in self.blocks:
            x = run(block, x, self.layout, rope)
        return x


@BACKBONES.register("cvt")
class CvT(Backbone):
    """
    Args:
        config: see :class:`CvTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = CvTConfig
    config: CvTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # widths, depths and strides of the scripts of the X-formers paper at 32 pixels
        "": dict(
            dims=(128, 128, 128), depths=(1, 1, 2), heads=(4, 4, 4), embed_kernels=(3, 3, 3),
            embed_strides=(1, 1, 1), mlp_ratio=2, class_token=False,
        ),
        "test": dict(
            input_shape=(3, 14, 11), num_classes=5, dims=(12, 20), depths=(1, 2), heads=(3, 2),
            embed_kernels=(5, 3), embed_strides=(2, 2), mlp_ratio=2,
        ),
        "13": _IMAGENET,
        "21": dict(depths=(1, 4, 16), **_IMAGENET),
        "w24": {
            **_IMAGENET, "input_shape": (3, 384, 384), "dims": (192, 768, 1024),
            "depths": (2, 2, 20), "heads": (3, 12, 16), "drop_path": 0.3,
        },
    }  # fmt: skip

    def __init__(self, config: CvTConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dims[-1]
        channels, *grid = c.input_shape
        stages = []
        for index, dim in enumerate(c.dims):
            stages.append(CvTStage(c, index, channels, tuple(grid)))
            channels, grid = dim, list(stages[-1].layout.grid)
        self.stages = nn.ModuleList(stages)
        self.layouts = [stage.layout for stage in stages]
        self.norm = nn.LayerNorm(c.dims[-1], c.norm_eps)
        self.head = self.make_head(c.num_classes)
        init_linears(self.stages)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, D) of the last stage, its class token in front."""
        self.check_input(x)
        picture = channels_last(x)
        for stage, layout in zip(self.stages, self.layouts, strict=True):
            x = stage(picture, self.run)
            picture = x[:, layout.prefix :].mT.unflatten(2, layout.grid)
        y: Tensor = self.norm(x)
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes); the pooled (B, D) with ``pre_logits``."""
        x = x[:, 0] if self.config.class_token else x.mean(1)
        y: Tensor = x if pre_logits else self.head(x)
        return y
