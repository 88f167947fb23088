"""ConvMixer (Trockman & Kolter 2022, arXiv 2201.09792) with any mixer.

Pixels -> patches -> depth x: x + norm(act(mixer x)), then norm(act(linear x)) -> mean -> head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from ..grid import TokenGrid
from ..layers import ACTIVATION, Activation, norm_tokens
from ..mixers import Mixer, create_mixer
from ..mixers.factorized import space_time
from ..options import check_at_least
from ..stems.base import PatchStem
from .base import BACKBONES, Stage, VisionModel
from .config import MixerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvMixerConfig(MixerConfig):
    """Configuration of :class:`ConvMixer`.

    Args:
        patch_size: pixels per token, one size or one for each axis.
        dim: width D.
        depth: number of blocks.
        heads: number of heads; None for a mixer without heads.
        factorized: for video: mix within each frame, then over time, instead of jointly.
        activation: "gelu" or "relu".
    """

    backbone: ClassVar[str] = "convmixer"
    patch_size: int | tuple[int, ...] = 2
    dim: int = 256
    depth: int = 8
    heads: int | None = None
    mixer: str = "conv"
    factorized: bool = False
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "depth"):
            check_at_least(name, getattr(self, name), 1)


class ConvMixerBlock(nn.Module):
    """Residual branches of one mixer each (space, then time), then a linear layer.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        mixers: of width D.
        activation: "gelu" or "relu".
    """

    def __init__(self, mixers: list[Mixer], activation: Activation) -> None:
        super().__init__()
        dim = mixers[0].dim
        self.mixers = nn.ModuleList(mixers)
        self.mixer_norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in mixers)
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim)
        self.act = ACTIVATION[activation]()

    def forward(self, x: Tensor, grid: TokenGrid, rope: None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``."""
        for mixer, norm in zip(self.mixers, self.mixer_norms, strict=True):
            x = x + norm_tokens(norm, self.act(mixer(x, grid)))
        return norm_tokens(self.norm, self.act(self.linear(x)))


def _imagenet(kernel: int, **fields: Any) -> dict[str, Any]:
    return dict(
        input_shape=(3, 224, 224), num_classes=1000, mixer_options={"kernel": kernel}, **fields
    )


@BACKBONES.register("convmixer")
class ConvMixer(VisionModel):
    """ConvMixer; the numbers of a size are width and depth.

    Shape: (B, C, *shape) -> (B, num_classes)

    Args:
        config: see :class:`ConvMixerConfig`.
    """

    config_class = ConvMixerConfig
    config: ConvMixerConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "256_8": dict(mixer_options={"kernel": 5}),
        "768_32": _imagenet(7, patch_size=7, dim=768, depth=32, activation="relu"),
        "1024_20": _imagenet(9, patch_size=14, dim=1024, depth=20),
        "1536_20": _imagenet(9, patch_size=7, dim=1536, depth=20),
    }  # fmt: skip

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dim
        self.stem = PatchStem(c.input_shape, c.patch_size, c.dim)
        self.act = ACTIVATION[c.activation]()
        self.stem_norm = nn.BatchNorm1d(c.dim)
        grid = self.stem.grid

        def make(grid: TokenGrid) -> Mixer:
            return create_mixer(c.mixer, dim=c.dim, heads=c.heads, grid=grid, **c.mixer_options)

        blocks = []
        for _ in range(c.depth):
            mixers = space_time(make, grid, c.dynamic_size) if c.factorized else [make(grid)]
            blocks.append(ConvMixerBlock(mixers, c.activation))
        self.blocks = Stage(blocks, grid)
        self.head = self.make_head(c.num_classes)

    def embed(self, x: Tensor) -> tuple[Tensor, TokenGrid]:
        """Compute tokens before the first block, (B, C, *shape) -> (B, N, D), and their grid."""
        grid = self.stem.grid_of(self.check_input(x))
        return norm_tokens(self.stem_norm, self.act(self.stem(x))), grid
