"""Convolutional vision transformer CvT (Wu et al. 2021, arXiv 2103.15808) with any mixer.

Pixels -> stages of (overlapping convolutional embedding -> blocks), the last with a class token ->
norm -> head. There are no position tables: the convolutions encode position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..grid import TokenGrid, on_grid
from ..kernels import KERNELS
from ..layers import CONV, ConvNorm, drop_paths, init_linears
from ..mixers import Mixer, create_mixer
from ..mixers.adapters import Adapter
from ..mixers.attention import Attention, Shorten, SplitProjection
from ..mixers.factory import check_mixer, create_kernel
from ..options import check_at_least, check_odd
from ..positions import RopeKind
from ..stems import check_input_shape
from .base import BACKBONES, Block, Downsampling, Stage, VisionModel, check_prefix, make_rope
from .config import BlockConfig, StageFields

_IMAGENET = dict(
    input_shape=(3, 224, 224), num_classes=1000, mixer_options={"qkv_bias": True}, drop_path=0.1
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CvTConfig(StageFields, BlockConfig):
    """Configuration of :class:`CvT`.

    Args:
        dims: width D of each stage.
        depths: number of blocks of each stage.
        heads: number of heads of each stage; None for a mixer without heads.
        embed_kernels: kernel size of the convolution that begins each stage.
        embed_strides: its stride.
        kernel: kernel size of the depth-wise convolutions before q, k and v, odd.
        kv_stride: stride of keys and values, if the mixer has them.
        class_token: whether the last stage has a class token that is classified, instead of the
            mean of the tokens.
        rope: rotary positions, "axial" or "raster", or None.
    """

    backbone: ClassVar[str] = "cvt"
    dims: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] | None = (1, 3, 6)
    embed_kernels: tuple[int, ...] = (7, 3, 3)
    embed_strides: tuple[int, ...] = (4, 2, 2)
    kernel: int = 3
    kv_stride: int = 2
    class_token: bool = True
    rope: RopeKind | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_input_shape(self.input_shape)
        self.check_stages(self.mixer, "embed_kernels", "embed_strides")
        for kernel, stride in zip(self.embed_kernels, self.embed_strides, strict=True):
            check_at_least(f"with embed_stride {stride} embed_kernel", kernel, stride)
        _check_convolutions(self.kernel, self.kv_stride)
        check_at_least("mlp_ratio", self.mlp_ratio, 1)


def _check_convolutions(kernel: int, kv_stride: int) -> None:
    """Raise a ValueError for sizes with which some tokens would never be read."""
    check_odd("kernel", kernel)
    check_at_least("kv_stride", kv_stride, 1)
    if kv_stride > kernel:
        raise ValueError(
            f"kv_stride {kv_stride} must be at most kernel {kernel}: some tokens would never be "
            "read"
        )


class ConvProjection(SplitProjection):
    """A depth-wise convolution with batch norm before each of the linear layers to q, k and v.

    Prefix tokens bypass the convolutions. q is divided by the square root of the number of heads:
    with the 1/sqrt(K) of the kernels the logits are scaled by 1/sqrt(D), as the authors do.

    Shape: (B, N, D) -> (B, N, H K), (B, M, G K), (B, M, G V)

    Args:
        dim: token width D.
        grid: positions of the N tokens.
        widths: of q, k and v; of q and k if the values are the keys.
        bias: whether the linear layers have one.
        heads: number of heads.
        kernel: kernel size of the convolutions, odd.
        kv_stride: stride of keys and values.
    """

    def __init__(
        self,
        dim: int,
        grid: TokenGrid,
        widths: tuple[int, ...],
        bias: bool,
        *,
        heads: int,
        kernel: int,
        kv_stride: int,
    ) -> None:
        super().__init__(dim, grid, widths, bias)
        self.kv_stride, self.q_scale = kv_stride, heads**-0.5
        self.convs = nn.ModuleList(
            ConvNorm(len(grid.shape), dim, dim, kernel, stride, groups=dim)
            for stride in (1, kv_stride, kv_stride)[: len(widths)]
        )

    def inputs(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve: (B, N, D) -> (B, N, D), (B, M, D), (B, M, D)."""
        q, k, *v = (on_grid(conv, x, grid) for conv in self.convs)
        return q, k, v[0] if v else k

    def forward(
        self, x: Tensor, grid: TokenGrid, shorten: Shorten | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project: (B, N, D) -> (B, N, H K), (B, M, G K), (B, M, G V)."""
        q, k, v = super().forward(x, grid, shorten)
        return q * self.q_scale, k, v


def cvt_attention(
    name: str,
    options: Mapping[str, Any],
    *,
    dim: int,
    heads: int | None,
    grid: TokenGrid,
    kernel: int = 3,
    kv_stride: int = 2,
) -> Mixer:
    """Attention of CvT: depth-wise convolutions before the linear layers to q, k and v.

    Args:
        name: mixer by name. One without queries and keys gets one convolution in front.
        options: of the mixer.
        dim: token width D.
        heads: number of heads, for mixers that have heads.
        grid: positions of the N tokens.
        kernel: kernel size of the convolutions, odd.
        kv_stride: stride of keys and values.

    Returns:
        A mixer (B, N, D) -> (B, N, D).

    Raises:
        ValueError: for an option that the mixer does not have.
    """
    check_mixer(name, dim, heads, grid, options)
    _check_convolutions(kernel, kv_stride)
    if name not in KERNELS:
        mixer = create_mixer(name, dim=dim, heads=heads, grid=grid, **options)
        return Adapter(mixer, conv=ConvNorm(len(grid.shape), dim, dim, kernel, groups=dim))
    made, own = create_kernel(name, dim, heads, grid, grid.strided(kv_stride), options)
    projection = ConvProjection(
        dim, grid, made.operand_widths, own.qkv_bias,
        heads=made.site.heads, kernel=kernel, kv_stride=kv_stride,
    )  # fmt: skip
    proj = nn.Linear(made.site.heads * made.site.value_dim, dim)
    return Attention(projection, made, proj, **own.layers)


class CvTEmbedding(Downsampling):
    """An overlapping convolution over the grid, layer norm, and a class token if there is one.

    Shape: (B, M, C) -> (B, N, D); the M tokens of the first stage are pixels

    Args:
        channels: input width C.
        dim: width D.
        axes: number of axes of the grid.
        kernel: kernel size of the convolution.
        stride: its stride.
        class_token: whether to prepend a class token.
        norm_eps: epsilon of the layer norm.
    """

    cls_token: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        dim: int,
        axes: int,
        *,
        kernel: int,
        stride: int,
        class_token: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.kernel, self.padding, self.stride = (
            kernel,
            (kernel - stride + 1) // 2,
            (stride,) * axes,
        )
        self.conv = CONV[axes](channels, dim, kernel, stride, self.padding)
        self.norm = nn.LayerNorm(dim, norm_eps)
        token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if class_token else None
        self.register_parameter("cls_token", token)

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """The grid of the output of the convolution.

        Raises:
            ValueError: for a grid that is too small for it.
        """
        stride, around = self.stride[0], 2 * self.padding - self.kernel
        shape = tuple((size + around) // stride + 1 for size in grid.shape)
        if min(shape) < 1:
            raise ValueError(
                f"a grid of {grid.shape} is too small for embed_kernel {self.kernel}, "
                f"embed_stride {stride}"
            )
        return TokenGrid(shape, int(self.cls_token is not None))

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Embed: (B, M, C) -> (B, N, D)."""
        x = self.norm(on_grid(self.conv, x, grid))
        if self.cls_token is None:
            return x
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)


@BACKBONES.register("cvt")
class CvT(VisionModel):
    """Convolutional vision transformer. Shape: (B, C, *shape) -> (B, num_classes).

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
            embed_strides=(1, 1, 1), mlp_ratio=2.0, class_token=False,
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
        self.pooled_by = "token" if c.class_token else "avg"
        channels, *shape = c.input_shape
        grid, rates = TokenGrid(tuple(shape)), drop_paths(c.drop_path, c.depths)
        stages = []
        for index, dim in enumerate(c.dims):
            embedding = CvTEmbedding(
                channels, dim, len(shape), kernel=c.embed_kernels[index],
                stride=c.embed_strides[index], norm_eps=c.norm_eps,
                class_token=c.class_token and index == len(c.dims) - 1,
            )  # fmt: skip
            stages.append(_stage(c, index, grid, embedding, rates[index]))
            channels, grid = dim, stages[-1].grid
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(c.dims[-1], c.norm_eps)
        self.head = self.make_head(c.num_classes)
        init_linears(self.stages)

    def embed(self, x: Tensor) -> tuple[Tensor, TokenGrid]:
        """View pixels as tokens with channels innermost: (B, C, *shape) -> (B, N, C)."""
        _, *shape = self.check_input(x)
        return x.movedim(1, -1).flatten(1, -2), TokenGrid(tuple(shape))

    def finish(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Normalize the tokens of the last stage, class token first: (B, N, D) -> (B, N, D)."""
        return self.norm(x)

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Select the class token, or average: (B, N, D) -> (B, D)."""
        return x[:, 0] if self.stages[-1].grid.prefix else x.mean(1)


def _stage(
    config: CvTConfig, index: int, before: TokenGrid, embedding: CvTEmbedding, rates: list[float]
) -> Stage:
    """The stage of that index, with a block for each rate of stochastic depth."""
    c, grid = config, embedding.out_grid(before)
    mixers = [
        cvt_attention(
            c.mixer, c.mixer_options, dim=c.dims[index], heads=c.heads_of(index), grid=grid,
            kernel=c.kernel, kv_stride=c.kv_stride,
        )
        for _ in rates
    ]  # fmt: skip
    blocks = [
        Block(mixer, c.mlp_ratio, dropout=c.dropout, drop_path=rate, norm_eps=c.norm_eps)
        for mixer, rate in zip(mixers, rates, strict=True)
    ]
    if grid.prefix:
        check_prefix(blocks, c.mixer, "class_token must be False")
    return Stage(blocks, grid, make_rope(c.rope, mixers[0], c.mixer), embedding, before)
