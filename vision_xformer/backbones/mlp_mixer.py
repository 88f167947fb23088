"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) and gMLP (Liu et al. 2021, 2105.08050).

Both are ViT whose tokens are mixed by linear layers along the length, or by any other mixer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..positions import PositionKind
from .base import BACKBONES
from .config import Config
from .vit import Pool, ViT, ViTConfig

_PATCH16 = dict(input_shape=(3, 224, 224), num_classes=1000, patch_size=16, norm_eps=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpMixerConfig(ViTConfig):
    """Configuration of :class:`MlpMixer`: that of ViT with other defaults."""

    backbone: ClassVar[str] = "mlp_mixer"
    mixer: str = "mlp"
    heads: int | None = None
    position: PositionKind = "none"
    pool: Pool = "mean"
    fc_norm: bool | None = False


@BACKBONES.register("mlp_mixer")
class MlpMixer(ViT):
    """MLP-Mixer. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`MlpMixerConfig`.
    """

    config_class: ClassVar[type[Config]] = MlpMixerConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "s32": {**_PATCH16, "patch_size": 32, "dim": 512, "depth": 8, "mlp_ratio": 4.0},
        "s16": dict(dim=512, depth=8, mlp_ratio=4.0, **_PATCH16),
        "b32": {**_PATCH16, "patch_size": 32, "dim": 768, "depth": 12, "mlp_ratio": 4.0},
        "b16": dict(dim=768, depth=12, mlp_ratio=4.0, **_PATCH16),
        "l16": dict(dim=1024, depth=24, mlp_ratio=4.0, **_PATCH16),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMLPConfig(MlpMixerConfig):
    """Configuration of :class:`GMLP`: that of MLP-Mixer with other defaults."""

    backbone: ClassVar[str] = "gmlp"
    mixer: str = "gmlp"
    mlp_ratio: float = 0.0


@BACKBONES.register("gmlp")
class GMLP(MlpMixer):
    """gMLP, whose blocks are one gated MLP each. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`GMLPConfig`.
    """

    config_class = GMLPConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        f"{size}16": dict(dim=dim, depth=30, **_PATCH16)
        for size, dim in (("ti", 128), ("s", 256), ("b", 512))
    }
