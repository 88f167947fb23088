"""Shared base of pyramids with window attention: stages of blocks, each on half the grid.

Swin (Liu et al. 2021, arXiv 2103.14030) and CrossFormer (Wang et al. 2021, arXiv 2108.00154) are
such pyramids, with any mixer that has queries and keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..biases import DynamicBias, RelativeBias
from ..grid import TokenGrid
from ..kernels import KERNELS
from ..kernels.windowed import WindowedKernel, Windows
from ..layers import drop_paths, init_linears
from ..mixers import Mixer
from ..mixers.attention import Attention, LinearProjection
from ..mixers.factory import check_mixer, create_kernel
from ..options import check_at_least
from ..stems import patch_grid
from .base import Block, Downsampling, Stage, VisionModel
from .config import BlockConfig, StageFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidConfig(StageFields, BlockConfig):
    """Configuration of pyramids of windows.

    Args:
        patch_size: pixels per token of the first stage, one size or one for each axis.
        dims: width D of each stage.
        depths: number of blocks of each stage.
        heads: number of heads of each stage.
        window: window size on each axis, in tokens. If the grid is not a multiple of it, the last
            window is smaller; the authors of Swin and timm pad with zeros instead.
        position_bias: whether to add a bias for each offset to the logits; False for a mixer that
            does not support it.
    """

    patch_size: int | tuple[int, ...] = 4
    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] | None = (3, 6, 12, 24)
    window: int = 7
    position_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_stages(self.mixer)
        check_at_least("window", self.window, 1)
        check_at_least("mlp_ratio", self.mlp_ratio, 1)


def window_attention(
    name: str,
    options: Mapping[str, Any],
    *,
    dim: int,
    heads: int | None,
    grid: TokenGrid,
    windows: Windows,
    position_bias: bool = True,
    bias_dim: int | None = None,
) -> Mixer:
    """Attention in windows of the grid.

    Args:
        name: mixer by name, with queries and keys.
        options: of the mixer.
        dim: token width D.
        heads: number of heads.
        grid: positions of the N tokens.
        windows: how the grid is cut.
        position_bias: whether the logits get a bias for each offset.
        bias_dim: width of the network that predicts the bias (CrossFormer); by default the bias is
            learned for each offset (Swin).

    Returns:
        A mixer (B, N, D) -> (B, N, D).

    Raises:
        ValueError: for a mixer without queries and keys, or one that is tied to its grid.
    """
    check_mixer(name, dim, heads, grid, options)
    if name not in KERNELS:
        raise ValueError(f"mixer {name!r} has no queries and keys, so it cannot attend in windows")
    window = windows.grid(grid)
    kernel, own = create_kernel(name, dim, heads, window, window, options)
    if kernel.fixed:
        raise ValueError(
            f"mixer {name!r} is tied to sequences of one length: windows are short already, and "
            "some are smaller"
        )
    bias: RelativeBias | DynamicBias | None = None
    if position_bias and bias_dim is None:
        bias = RelativeBias(window.shape, kernel.site.heads)
    elif position_bias and bias_dim is not None:
        bias = DynamicBias(window.shape, kernel.site.heads, bias_dim)
    return Attention(
        LinearProjection(dim, grid, kernel.operand_widths, own.qkv_bias),
        WindowedKernel(kernel, windows),
        nn.Linear(kernel.site.heads * kernel.site.value_dim, dim),
        bias=bias,
        **own.layers,
    )


class Pyramid(VisionModel):
    """Base of Swin and CrossFormer; subclasses define stem, merging and attention.

    Pixels -> stem -> stages of (merging -> blocks) -> norm -> mean -> head.

    Args:
        config: see :class:`PyramidConfig`.
    """

    config: PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dims[-1]
        grid = TokenGrid(patch_grid(c.input_shape, c.patch_size)[1])
        self.stem = self.make_stem()
        self.stem_norm = nn.LayerNorm(c.dims[0], c.norm_eps)
        stages = []
        for index, rates in enumerate(drop_paths(c.drop_path, c.depths)):
            merging = self.make_merging(index, len(grid.shape)) if index else None
            before, grid = grid, grid if merging is None else merging.out_grid(grid)
            blocks = [
                Block(
                    self.make_attention(index, bool(number % 2), grid), c.mlp_ratio,
                    dropout=c.dropout, drop_path=rate, norm_eps=c.norm_eps,
                )
                for number, rate in enumerate(rates)
            ]  # fmt: skip
            stages.append(Stage(blocks, grid, downsample=merging, in_grid=before))
        self.stages = nn.ModuleList(stages)
        init_linears(self.stages)
        self.norm = nn.LayerNorm(c.dims[-1], c.norm_eps)
        self.head = self.make_head(c.num_classes)

    def make_stem(self) -> nn.Module:
        """The module (B, C, *shape) -> (B, D, *grid)."""
        raise NotImplementedError

    def make_merging(self, index: int, axes: int) -> Downsampling:
        """The module (B, N, D) -> (B, n, E) that halves the previous grid before a stage."""
        raise NotImplementedError

    def make_attention(self, index: int, odd: bool, grid: TokenGrid) -> Mixer:
        """The attention of an even or odd block of the stage: (B, N, D) -> (B, N, D)."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> tuple[Tensor, TokenGrid]:
        """Compute tokens before the first stage, (B, C, *shape) -> (B, N, D), and their grid."""
        _, shape = patch_grid(self.check_input(x), self.config.patch_size)
        return self.stem_norm(self.stem(x).flatten(2).mT), TokenGrid(shape)

    def finish(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Normalize the tokens of the last stage: (B, N, D) -> (B, N, D)."""
        return self.norm(x)
