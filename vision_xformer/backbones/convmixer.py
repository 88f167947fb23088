"""ConvMixer (Trockman & Kolter 2022, arXiv 2201.09792) with any mixer.

Pixels -> patches -> depth x: x + norm(act(mixer x)), then norm(act(linear x)) -> mean -> head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from ..layers import ACTIVATION, TokenBatchNorm
from ..layout import Layout
from ..mixers import Mixer, create_mixer
from ..mixers.along import space_time
from ..registry import check_at_least, unknown
from ..stems import PatchStem
from .base import BACKBONES, Backbone, Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvMixerConfig(Config):
    """
    Args:
        patch: pixels for each token, one size or one for each axis.
        dim, depth: width D and number of blocks.
        heads: of a mixer that has them, else None.
        mixer, mixer_options: token mixer by name and its options.
        factorised: of frames, height and width, whether a mixer for each frame is followed by one
            over time in place of one over all.
        activation: "gelu" or "relu".
    """

    backbone: ClassVar[str] = "convmixer"
    patch: int | tuple[int, ...] = 2
    dim: int = 256
    depth: int = 8
    heads: int | None = None
    mixer: str = "conv"
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    factorised: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "depth"):
            check_at_least(name, getattr(self, name), 1)
        if self.activation not in ACTIVATION:
            raise unknown("activation", self.activation, ACTIVATION)


class ConvMixerBlock(nn.Module):
    """(B, N, D) -> same. Several mixers (space, then time) are one residual branch each."""

    def __init__(self, mixers: list[Mixer], activation: str) -> None:
        super().__init__()
        dim = mixers[0].dim
        self.mixers = nn.ModuleList(mixers)
        self.mixer_norms = nn.ModuleList(TokenBatchNorm(dim) for _ in mixers)
        self.linear = nn.Linear(dim, dim)
        self.norm = TokenBatchNorm(dim)
        self.act = ACTIVATION[activation]()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        for mixer, norm in zip(self.mixers, self.mixer_norms, strict=True):
            x = x + norm(self.act(mixer(x, layout)))
        y: Tensor = self.norm(self.act(self.linear(x)))
        return y


def _imagenet(kernel: int, **fields: Any) -> dict[str, Any]:
    return dict(
        input_shape=(3, 224, 224), num_classes=1000, mixer_options={"kernel": kernel}, **fields
    )


@BACKBONES.register("convmixer")
class ConvMixer(Backbone):
    """The numbers of a size are width and depth.

    Args:
        config: see :class:`ConvMixerConfig`.
    """

    config_class = ConvMixerConfig
    config: ConvMixerConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": dict(input_shape=(3, 14, 10), num_classes=5, dim=12, depth=2,
                     mixer_options={"kernel": 3}),
        "256_8": dict(mixer_options={"kernel": 5}),
        "768_32": _imagenet(7, patch=7, dim=768, depth=32, activation="relu"),
        "1024_20": _imagenet(9, patch=14, dim=1024, depth=20),
        "1536_20": _imagenet(9, patch=7, dim=1536, depth=20),
    }  # fmt: skip

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dim
        self.stem = PatchStem(c.input_shape, c.patch, c.dim)
        self.layout = Layout(self.stem.grid)
        self.act = ACTIVATION[c.activation]()
        self.stem_norm = TokenBatchNorm(c.dim)

        def make(layout: Layout) -> Mixer:
            return create_mixer(c.mixer, dim=c.dim, heads=c.heads, layout=layout, **c.mixer_options)

        self.blocks = nn.ModuleList(
            ConvMixerBlock(
                space_time(make, self.layout) if c.factorised else [make(self.layout)],
                c.activation,
            )
            for _ in range(c.depth)
        )
        self.head = self.make_head(c.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, D)"""
        self.check_input(x)
        x = self.stem_norm(self.act(self.stem(x)))
        for block in self.blocks:
            x = self.run(block, x, self.layout)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes); the pooled (B, D) with ``pre_logits``."""
        x = x.mean(1)
        y: Tensor = x if pre_logits else self.head(x)
        return y
