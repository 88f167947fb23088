"""LeViT (Graham et al. 2021, arXiv 2104.01136) with any mixer.

Pixels -> convolutions -> stages of blocks, with attention that downsamples the grid in between ->
mean -> head. Batch norm replaces layer norm throughout, so that it can be folded for inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..biases import PositionBias
from ..grid import TokenGrid, take_strided
from ..kernels import KERNELS
from ..layers import (
    ConvNorm,
    DistilledHead,
    LinearNorm,
    NormLinear,
    init_linears,
    make_drop_path,
    mlp_width,
)
from ..mixers import Mixer, create_mixer, mixer_options
from ..mixers.adapters import Adapter
from ..mixers.attention import Attention, Projection
from ..mixers.factory import check_mixer, create_kernel
from ..options import check_at_least
from ..positions import RopeKind, RotaryPosition
from ..stems import STEMS
from .base import BACKBONES, Downsampling, Stage, VisionModel, make_rope
from .config import MixerConfig, StageFields

_IMAGENET = dict(input_shape=(3, 224, 224), num_classes=1000, distilled=True)
_KEY32 = dict(key_dim=32, depths=(4, 4, 4), **_IMAGENET)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeViTConfig(StageFields, MixerConfig):
    """Configuration of :class:`LeViT`: stages, mixer and the following.

    Args:
        patch_size: pixels per token of the first stage, one size or one for each axis.
        stem_layers: number of convolutions that share the strides of the patch size.
        key_dim: key width K per head; None for a mixer without heads. The downsampling attention
            has D / K heads.
        value_ratio: value width per head for a key width of 1, doubled where the grid is
            downsampled; for mixers with values.
        mlp_ratio: hidden width of the MLPs for a width of 1.
        position_bias: whether to add a learned bias for each distance to the logits; False for a
            mixer that does not support it.
        rope: rotary positions, "axial" or "raster", or None.
        drop_path: probability with which a sample skips a branch.
        distilled: whether there is a second head, for the labels of a teacher (section 4.1).
        fused: whether the batch norms are folded, see :meth:`LeViT.fuse`.
    """

    backbone: ClassVar[str] = "levit"
    patch_size: int | tuple[int, ...] = 16
    stem_layers: int = 4
    dims: tuple[int, ...] = (128, 256, 384)
    depths: tuple[int, ...] = (2, 3, 4)
    heads: tuple[int, ...] | None = (4, 6, 8)
    key_dim: int | None = 16
    value_ratio: int = 2
    mlp_ratio: float = 2.0
    position_bias: bool = True
    rope: RopeKind | None = None
    drop_path: float = 0.0
    distilled: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stages(self.mixer)
        name, width = self.mixer, self.key_dim
        if self.heads is None and width is not None:
            raise ValueError(f"mixer {name!r} has no heads: key_dim {width} must be None")
        if self.heads is not None and width is None:
            raise ValueError(f"mixer {name!r} needs heads and key_dim, not key_dim None")
        if width is not None:
            check_at_least("key_dim", width, 1)
        if "head_dim" in self.mixer_options:
            raise ValueError("head_dim in mixer_options is key_dim in LeViT: set that")
        check_at_least("value_ratio", self.value_ratio, 1)
        check_at_least("mlp_ratio", self.mlp_ratio, 1)
        if self.dynamic_size and self.position_bias:
            raise ValueError("position_bias=True is tied to one grid: dynamic_size must be False")


class NormProjection(Projection):
    """Linear layers to q, k and v, each followed by batch norm; queries may be strided.

    Shape: (B, N, D) -> (B, n, H K), (B, N, G K), (B, N, G V)

    Args:
        dim: token width D.
        grid: positions of the N tokens.
        widths: of q, k and v; of q and k if the values are the keys.
        stride: stride of the queries on the grid.
    """

    def __init__(self, dim: int, grid: TokenGrid, widths: tuple[int, ...], stride: int) -> None:
        super().__init__(dim, grid, widths)
        self.stride = stride
        if stride == 1:
            self.qkv = LinearNorm(dim, sum(widths))
        else:
            self.q = LinearNorm(dim, widths[0])
            self.kv = LinearNorm(dim, sum(widths[1:]))

    def forward(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Project: (B, N, D) -> (B, n, H K), (B, N, G K), (B, N, G V)."""
        if self.stride == 1:
            q, k, *v = self.qkv(x).split(self.widths, -1)
        else:
            q = self.q(take_strided(x, grid, self.stride))
            k, *v = self.kv(x).split(self.widths[1:], -1)
        return q, k, v[0] if v else k


def levit_attention(
    name: str,
    options: Mapping[str, Any],
    *,
    dim: int,
    heads: int | None,
    grid: TokenGrid,
    value_ratio: int = 2,
    position_bias: bool = True,
    stride: int = 1,
    out_dim: int | None = None,
) -> Mixer:
    """Attention of LeViT: batch norm, hard-swish before the output, a bias for each distance.

    Args:
        name: mixer by name. One without queries and keys gets the stride and the output projection.
        options: of the mixer.
        dim: token width D.
        heads: number of heads, for mixers that have heads.
        grid: positions of the N tokens.
        value_ratio: value width per head for a key width of 1.
        position_bias: whether the logits get a bias.
        stride: with 2 the attention downsamples the grid.
        out_dim: output width E; D by default. With stride 1 and no ``out_dim`` the mixer is a
            residual branch, whose output is initialized to zero.

    Returns:
        A mixer (B, N, D) -> (B, n, E).

    Raises:
        ValueError: for an option that the mixer does not have, or a bias without a map.
    """
    check_mixer(name, dim, heads, grid, options)
    check_at_least("value_ratio", value_ratio, 1)
    if stride not in (1, 2):
        raise ValueError(f"stride {stride} must be 1, or 2 to downsample the grid")
    if out_dim is not None:
        check_at_least("out_dim", out_dim, 1)
    initial = 0.0 if stride == 1 and out_dim is None else 1.0

    def output(width: int) -> nn.Module:
        return nn.Sequential(nn.Hardswish(), LinearNorm(width, out_dim or dim, initial))

    if name not in KERNELS:
        if position_bias:
            raise ValueError(f"mixer {name!r} has no attention map: position_bias must be False")
        mixer = create_mixer(name, dim=dim, heads=heads, grid=grid, **options)
        return Adapter(mixer, stride=stride, proj=output(dim))
    kernel, own = create_kernel(name, dim, heads, grid.strided(stride), grid, options, value_ratio)
    if own.qkv_bias:
        raise ValueError("qkv_bias=True has no effect before a batch norm: leave it out")
    return Attention(
        NormProjection(dim, grid, kernel.operand_widths, stride),
        kernel,
        output(kernel.site.heads * kernel.site.value_dim),
        bias=PositionBias(grid, kernel.site.heads, stride) if position_bias else None,
        **own.layers,
    )


class LeViTBlock(nn.Module):
    """x + mixer(x), then x + mlp(x); no residual around a downsampling mixer.

    Shape: (B, N, D) -> (B, n, E)

    Args:
        mixer: (B, N, D) -> (B, n, E).
        dim: output width E.
        mlp_ratio: hidden width of the MLP for a width of 1.
        drop_path: probability with which a sample skips a branch.
        downsamples: whether the mixer downsamples the grid.
    """

    def __init__(
        self, mixer: Mixer, dim: int, mlp_ratio: float, drop_path: float, downsamples: bool
    ) -> None:
        super().__init__()
        self.mixer, self.downsamples = mixer, downsamples
        hidden = mlp_width(dim, mlp_ratio)
        layers = LinearNorm(dim, hidden), nn.Hardswish(), LinearNorm(hidden, dim, 0.0)
        self.mlp = nn.Sequential(*layers)
        self.drop_path = make_drop_path(drop_path)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``, with angles ``rope`` (N, A)."""
        y = self.mixer(x, grid, rope)
        x = y if self.downsamples else x + self.drop_path(y)
        return x + self.drop_path(self.mlp(x))


class Downsample(Downsampling):
    """A block whose attention downsamples the previous grid. Shape: (B, N, D) -> (B, n, E).

    Args:
        block: applied on the previous grid.
        rope: rotary positions of that grid.
    """

    def __init__(self, block: LeViTBlock, rope: RotaryPosition | None) -> None:
        super().__init__()
        self.block, self.rope = block, rope
        self.stride = (2,) * len(block.mixer.grid.shape)

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """The grid of the queries."""
        return self.block.mixer.out_grid(grid)

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Halve the grid: (B, N, D) -> (B, n, E)."""
        return self.block(x, grid, None if self.rope is None else self.rope(x, grid))


def _stage(config: LeViTConfig, index: int, grid: TokenGrid) -> Stage:
    """The stage of that index; ``grid`` is that of the previous stage, or of the stem."""
    c, options = config, dict(config.mixer_options)
    if c.key_dim is not None and "head_dim" in mixer_options(c.mixer):
        options["head_dim"] = c.key_dim
    downsample, before = None, grid
    if index:
        width = c.dims[index - 1]
        mixer = levit_attention(
            c.mixer, options, dim=width, grid=grid,
            heads=None if c.key_dim is None else max(1, width // c.key_dim),
            value_ratio=2 * c.value_ratio, position_bias=c.position_bias,
            stride=2, out_dim=c.dims[index],
        )  # fmt: skip
        block = LeViTBlock(mixer, c.dims[index], c.mlp_ratio, c.drop_path, downsamples=True)
        downsample = Downsample(block, make_rope(c.rope, mixer, c.mixer))
        grid = downsample.out_grid(grid)
    mixers = [
        levit_attention(
            c.mixer, options, dim=c.dims[index], heads=c.heads_of(index), grid=grid,
            value_ratio=c.value_ratio, position_bias=c.position_bias,
        )
        for _ in range(c.depths[index])
    ]  # fmt: skip
    blocks = [LeViTBlock(m, m.dim, c.mlp_ratio, c.drop_path, downsamples=False) for m in mixers]
    return Stage(blocks, grid, make_rope(c.rope, mixers[0], c.mixer), downsample, before)


@BACKBONES.register("levit")
class LeViT(VisionModel):
    """LeViT. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`LeViTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = LeViTConfig
    config: LeViTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # width and depth of the paper, one token per pixel, and one downsampling attention
        "": dict(patch_size=1, stem_layers=3, dims=(128, 128), depths=(2, 2), heads=(4, 4)),
        "128s": _IMAGENET,
        "128": dict(depths=(4, 4, 4), heads=(4, 8, 12), **_IMAGENET),
        "192": dict(dims=(192, 288, 384), heads=(3, 5, 6), **_KEY32),
        "256": dict(dims=(256, 384, 512), heads=(4, 6, 8), **_KEY32),
        "384": dict(dims=(384, 512, 768), heads=(6, 9, 12), drop_path=0.1, **_KEY32),
    }  # fmt: skip

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dims[-1]
        stem = {"layers": c.stem_layers}
        self.stem = STEMS.create("levit", c.input_shape, c.patch_size, c.dims[0], options=stem)
        stages: list[Stage] = []
        for index in range(len(c.dims)):
            stages.append(_stage(c, index, stages[-1].grid if stages else self.stem.grid))
        self.stages = nn.ModuleList(stages)
        init_linears(self.stages)
        self.head = self.make_head(c.num_classes)
        if c.fused:
            self.fuse()

    def make_head(self, num_classes: int) -> nn.Module:
        """Batch norm and a linear classifier, or two of them; the identity for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        heads: list[nn.Module] = []
        for _ in range(1 + self.config.distilled):
            head = NormLinear(self.num_features, num_classes)
            init_linears(head)
            heads.append(head.fused() if self.config.fused else head)
        if not self.config.distilled:
            return heads[0]
        both = DistilledHead(*heads)
        before = getattr(self, "head", None)
        both.separate = isinstance(before, DistilledHead) and before.separate
        return both

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the logits of both heads separately in training, so that each has its own loss.

        Raises:
            ValueError: for a model without a second head.
        """
        if not isinstance(self.head, DistilledHead):
            raise ValueError(
                f"there is no second head to train: distilled is {self.config.distilled} and "
                f"num_classes {self.config.num_classes}"
            )
        self.head.separate = enable

    @torch.no_grad()
    def fuse(self) -> Self:
        """Fold each batch norm into the adjacent layer, in place (for inference).

        The logits in evaluation stay the same; further training has no normalization.
        """
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, ConvNorm | LinearNorm | NormLinear):
                    setattr(module, name, child.fused())
        self.config = dataclasses.replace(self.config, fused=True)
        return self

    def embed(self, x: Tensor) -> tuple[Tensor, TokenGrid]:
        """Compute tokens before the first stage, (B, C, *shape) -> (B, N, D), and their grid."""
        grid = self.stem.grid_of(self.check_input(x))
        return self.stem(x), grid
