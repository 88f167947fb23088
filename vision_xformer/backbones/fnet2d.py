"""FNet2D (Jeevan & Sethi 2022, arXiv 2107.02239): Fourier mixing of the map instead of a sequence.

Two convolutions, then depth x: x + MLP(BatchNorm(Re FFT over height, width and channels)).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from ..layers import Mlp, TokenBatchNorm
from ..layout import Layout
from ..mixers.fourier import Fourier
from ..registry import check_at_least
from ..stems import ConvStem
from .base import BACKBONES, Backbone, Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class FNet2DConfig(Config):
    """
    Args:
        dim, depth, mlp_dim: width D (even), number of blocks, hidden width of the MLP.
        dropout: in the MLP.
    """

    backbone: ClassVar[str] = "fnet2d"
    dim: int = 128
    depth: int = 5
    mlp_dim: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dim", 2), ("depth", 1), ("mlp_dim", 1)):
            check_at_least(name, getattr(self, name), least)


class Block(nn.Module):
    """(B, N, D) -> (B, N, D); one residual round all of it."""

    def __init__(self, config: FNet2DConfig, layout: Layout) -> None:
        super().__init__()
        self.mixer = Fourier(config.dim, None, layout, axes="grid")
        self.norm = TokenBatchNorm(config.dim)
        self.mlp = Mlp(config.dim, config.mlp_dim, config.dropout)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        y: Tensor = x + self.mlp(self.norm(self.mixer(x, layout)))
        return y


@BACKBONES.register("fnet2d")
class FourierNetwork2D(Backbone):
    """Takes images of any size. No positions, no class token.

    Args:
        config: see :class:`FNet2DConfig`.
    """

    config_class = FNet2DConfig
    config: FNet2DConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "": {},
        "test": dict(input_shape=(3, 14, 10), num_classes=5, dim=12, depth=2, mlp_dim=20),
    }

    def __init__(self, config: FNet2DConfig) -> None:
        super().__init__(config)
        self.num_features = config.dim
        self.stem = ConvStem(config.input_shape, 1, config.dim, channels=(config.dim // 2,))
        self.blocks = nn.ModuleList(
            Block(config, Layout(self.stem.grid)) for _ in range(config.depth)
        )
        self.head = self.make_head(config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, D)"""
        self.check_input(x, any_size=True)
        layout = Layout(tuple(x.shape[2:]))
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(block, x, layout)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes); the pooled (B, D) with ``pre_logits``."""
        x = x.mean(1)
        y: Tensor = x if pre_logits else self.head(x)
        return y
