"""PVT v2 (Wang et al. 2022, arXiv 2106.13797) with any mixer.

Pixels -> stages of (overlapping patch embedding -> blocks -> norm) -> mean -> head. Attention reads
keys and values from a reduced grid, and a depth-wise convolution in the MLP encodes position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..grid import TokenGrid, on_grid
from ..kernels import KERNELS
from ..layers import CONV, drop_paths, init_linears, make_drop_path, mlp_width
from ..mixers import Mixer, create_mixer
from ..mixers.attention import Attention, SplitProjection
from ..mixers.factory import check_mixer, create_kernel
from ..stems import patch_grid
from .base import BACKBONES, Downsampling, Stage, VisionModel
from .config import BlockConfig, StageFields

_IMAGENET = dict(input_shape=(3, 224, 224), num_classes=1000, mixer_options={"qkv_bias": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PVTConfig(StageFields, BlockConfig):
    """Configuration of :class:`PVT`.

    Args:
        patch_size: pixels per token of the first stage, one size or one for each axis.
        dims: width D of each stage.
        depths: number of blocks of each stage.
        heads: number of heads of each stage; None for a mixer without heads.
        reductions: in each stage, keys and values are read from a grid reduced by this factor.
        mlp_ratio: in each stage, hidden width of the MLPs for a width of 1.
    """

    backbone: ClassVar[str] = "pvt"
    patch_size: int | tuple[int, ...] = 4
    dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] | None = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)  # type: ignore[assignment]
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stages(self.mixer, "reductions", "mlp_ratio")


class ReductionProjection(SplitProjection):
    """Keys and values are projected from a grid that a convolution reduces.

    The last cells of an axis that the reduction does not divide are not read, as in timm.

    Shape: (B, N, D) -> (B, N, H K), (B, M, G K), (B, M, G V)

    Args:
        dim: token width D.
        grid: positions of the N tokens.
        widths: of q, k and v; of q and k if the values are the keys.
        bias: whether the linear layers have one.
        reduction: kernel size and stride of the convolution.
    """

    def __init__(
        self, dim: int, grid: TokenGrid, widths: tuple[int, ...], bias: bool, reduction: int
    ) -> None:
        super().__init__(dim, grid, widths, bias)
        self.reduction = reduction
        self.reduce = _initialized(CONV[len(grid.shape)](dim, dim, reduction, reduction))
        self.norm = nn.LayerNorm(dim)

    def inputs(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens (B, N, D), and the reduced ones (B, M, D) twice."""
        reduced = self.norm(on_grid(self.reduce, x, grid))
        return x, reduced, reduced

    def keys(self, grid: TokenGrid) -> TokenGrid:
        """The reduced grid."""
        return _reduced(grid, self.reduction)


def _initialized(conv: _ConvNd) -> _ConvNd:
    """Draw weights as the authors do: variance 2 / fan-out of a group; the bias is zero."""
    fan_out = conv.out_channels * math.prod(conv.kernel_size) // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _reduced(grid: TokenGrid, reduction: int) -> TokenGrid:
    """The grid of whole patches of ``reduction`` cells on each axis."""
    shape = tuple(size // reduction for size in grid.shape)
    if min(shape) < 1:
        raise ValueError(f"a grid of {grid.shape} is too small for a reduction of {reduction}")
    return TokenGrid(shape)


def pvt_attention(
    name: str,
    options: Mapping[str, Any],
    *,
    dim: int,
    heads: int | None,
    grid: TokenGrid,
    reduction: int,
) -> Mixer:
    """Attention of PVT v2, whose keys and values are on a reduced grid.

    Args:
        name: mixer by name. One without queries and keys mixes all tokens.
        options: of the mixer.
        dim: token width D.
        heads: number of heads, for mixers that have heads.
        grid: positions of the N tokens.
        reduction: of the grid of keys and values; 1 for none.

    Returns:
        A mixer (B, N, D) -> (B, N, D).

    Raises:
        ValueError: for an option that the mixer does not have, or a grid that is too small.
    """
    if name not in KERNELS or reduction == 1:
        return create_mixer(name, dim=dim, heads=heads, grid=grid, **options)
    check_mixer(name, dim, heads, grid, options)
    kernel, own = create_kernel(name, dim, heads, grid, _reduced(grid, reduction), options)
    return Attention(
        ReductionProjection(dim, grid, kernel.operand_widths, own.qkv_bias, reduction),
        kernel,
        nn.Linear(kernel.site.heads * kernel.site.value_dim, dim),
        **own.layers,
    )


class ConvMlp(nn.Module):
    """Linear, depth-wise 3x3 convolution, GELU, linear. Shape: (B, N, D) -> (B, N, D).

    Args:
        axes: number of axes of the grid.
        dim: width D.
        hidden_dim: hidden width.
        dropout: dropout after GELU and at the end.
    """

    def __init__(self, axes: int, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        conv = CONV[axes](hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.conv = _initialized(conv)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Apply the MLP to tokens (B, N, D) on ``grid``."""
        x = self.drop(self.act(on_grid(self.conv, self.fc1(x), grid)))
        return self.drop(self.fc2(x))


class PVTBlock(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x). Shape: (B, N, D) -> (B, N, D).

    Args:
        mixer: of width D.
        mlp: of width D.
        drop_path: probability with which a sample skips a branch.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(self, mixer: Mixer, mlp: ConvMlp, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(mixer.dim, norm_eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(mixer.dim, norm_eps)
        self.mlp = mlp
        self.drop_path = make_drop_path(drop_path)

    def forward(self, x: Tensor, grid: TokenGrid, rope: None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``."""
        x = x + self.drop_path(self.mixer(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class PVTEmbedding(Downsampling):
    """An overlapping convolution over the grid, then layer norm.

    Shape: (B, M, C) -> (B, N, D); the M tokens of the first stage are pixels

    Args:
        channels: input width C.
        dim: width D.
        stride: of the convolution, whose kernel size is 2 * stride - 1, and at least 3.
    """

    def __init__(self, channels: int, dim: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride
        kernel = tuple(max(3, 2 * s - 1) for s in stride)
        padding = tuple(k // 2 for k in kernel)
        self.conv = _initialized(CONV[len(stride)](channels, dim, kernel, stride, padding))
        self.norm = nn.LayerNorm(dim)

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """The grid divided by the stride, rounded up."""
        pairs = zip(grid.shape, self.stride, strict=True)
        return TokenGrid(tuple(-(-size // s) for size, s in pairs))

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Embed: (B, M, C) -> (B, N, D)."""
        return self.norm(on_grid(self.conv, x, grid))


class PVTStage(Stage):
    """A stage whose output is normalized. Shape: (B, M, C) -> (B, N, D).

    Args:
        blocks: blocks of width D.
        grid: positions of the N tokens.
        embedding: brings the output of the previous stage to this grid.
        norm: layer norm of width D.
        in_grid: positions of the M tokens.
    """

    def __init__(
        self,
        blocks: list[PVTBlock],
        grid: TokenGrid,
        embedding: PVTEmbedding,
        norm: nn.Module,
        in_grid: TokenGrid,
    ) -> None:
        super().__init__(blocks, grid, downsample=embedding, in_grid=in_grid)
        self.norm = norm

    def forward(self, x: Tensor, grid: TokenGrid | None = None) -> Tensor:
        """Apply the stage to tokens on ``grid``: (B, M, C) -> (B, N, D)."""
        return self.norm(super().forward(x, grid))


@BACKBONES.register("pvt")
class PVT(VisionModel):
    """Pyramid vision transformer, version 2. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`PVTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = PVTConfig
    config: PVTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "v2_b0": dict(dims=(32, 64, 160, 256), **_IMAGENET),
        "v2_b1": _IMAGENET,
        "v2_b2": dict(depths=(3, 4, 6, 3), **_IMAGENET),
    }

    def __init__(self, config: PVTConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dims[-1]
        patch_size, _ = patch_grid(c.input_shape, c.patch_size, ragged=True)
        channels, *shape = c.input_shape
        grid, stride, stages = TokenGrid(tuple(shape)), patch_size, []
        for index, rates in enumerate(drop_paths(c.drop_path, c.depths)):
            embedding = PVTEmbedding(channels, c.dims[index], stride)
            before, grid = grid, embedding.out_grid(grid)
            blocks = [self._block(index, grid, rate) for rate in rates]
            norm = nn.LayerNorm(c.dims[index], c.norm_eps)
            stages.append(PVTStage(blocks, grid, embedding, norm, before))
            channels, stride = c.dims[index], (2,) * len(shape)
        self.stages = nn.ModuleList(stages)
        init_linears(self.stages)
        self.head = self.make_head(c.num_classes)

    def _block(self, stage: int, grid: TokenGrid, drop_path: float) -> PVTBlock:
        c, dim = self.config, self.config.dims[stage]
        mixer = pvt_attention(
            c.mixer, c.mixer_options, dim=dim, heads=c.heads_of(stage), grid=grid,
            reduction=c.reductions[stage],
        )  # fmt: skip
        mlp = ConvMlp(len(grid.shape), dim, mlp_width(dim, c.mlp_ratio[stage]), c.dropout)
        return PVTBlock(mixer, mlp, drop_path, c.norm_eps)

    def embed(self, x: Tensor) -> tuple[Tensor, TokenGrid]:
        """View pixels as tokens with channels innermost: (B, C, *shape) -> (B, N, C)."""
        _, *shape = self.check_input(x)
        return x.movedim(1, -1).flatten(1, -2), TokenGrid(tuple(shape))
