"""FNet2D (Jeevan & Sethi 2022, arXiv 2107.02239): Fourier mixing of the map instead of a sequence.

Two convolutions, then depth x: x + MLP(BatchNorm(Re FFT over height, width and channels)).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..layers import Mlp, mlp_width, norm_tokens
from ..mixers.fourier import Fourier
from ..options import check_at_least
from ..precision import autocasts, to_accumulate
from ..stems.convolutional import ConvStem
from .base import BACKBONES, Stage, VisionModel
from .config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class FNet2DConfig(Config):
    """Configuration of :class:`FNet2D`.

    Args:
        dynamic_size: whether the model accepts samples of any size; True by default.
        dim: width D.
        depth: number of blocks.
        mlp_ratio: hidden width of the MLPs for a width of 1.
        dropout: dropout in the MLP.
    """

    backbone: ClassVar[str] = "fnet2d"
    dynamic_size: bool = True
    dim: int = 128
    depth: int = 5
    mlp_ratio: float = 2.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dim", 2), ("depth", 1)):
            check_at_least(name, getattr(self, name), least)
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} must be above 0")


class FNet2DBlock(nn.Module):
    """x + MLP(norm(mixer x)), with one residual around the whole block.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        config: of the model.
        grid: positions of the N tokens; any other grid works, too.
    """

    def __init__(self, config: FNet2DConfig, grid: TokenGrid) -> None:
        super().__init__()
        self.mixer = Fourier(config.dim, None, grid, axes="grid")
        self.norm = nn.BatchNorm1d(config.dim)
        self.mlp = Mlp(config.dim, mlp_width(config.dim, config.mlp_ratio), config.dropout)

    def forward(self, x: Tensor, grid: TokenGrid, rope: None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``."""
        wide = x
        if x.dtype == torch.float16 and autocasts(x):  # its sums over the map may overflow
            (wide,) = to_accumulate(x)
        return x + self.mlp(norm_tokens(self.norm, self.mixer(wide, grid)))


@BACKBONES.register("fnet2d")
class FNet2D(VisionModel):
    """FNet2D, for images of any size; without positions and class token.

    The transform of large images is beyond the range of float16: use autocast or bfloat16 instead
    of ``half()``.

    Shape: (B, C, *shape) -> (B, num_classes)

    Args:
        config: see :class:`FNet2DConfig`.

    Raises:
        ValueError: for an invalid value.
    """

    config_class = FNet2DConfig
    config: FNet2DConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"": {}}

    def __init__(self, config: FNet2DConfig) -> None:
        super().__init__(config)
        self.num_features = config.dim
        self.stem = ConvStem(config.input_shape, 1, config.dim, channels=(config.dim // 2,))
        blocks = [FNet2DBlock(config, self.stem.grid) for _ in range(config.depth)]
        self.blocks = Stage(blocks, self.stem.grid)
        self.head = self.make_head(config.num_classes)

    def embed(self, x: Tensor) -> tuple[Tensor, TokenGrid]:
        """Compute tokens before the first block, (B, C, *shape) -> (B, N, D), and their grid."""
        grid = self.stem.grid_of(self.check_input(x))
        return self.stem(x), grid
