"""SimpleViT: "Better plain ViT baselines" (Beyer et al. 2022, arXiv 2205.01580) with any mixer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..positions import PositionKind
from .base import BACKBONES
from .vit import Pool, ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpleViTConfig(ViTConfig):
    """Configuration of :class:`SimpleViT`: that of ViT with other defaults."""

    backbone: ClassVar[str] = "simple_vit"
    position: PositionKind = "sincos"
    pool: Pool = "mean"
    fc_norm: bool | None = False


@BACKBONES.register("simple_vit")
class SimpleViT(ViT):
    """ViT with sin-cos positions and mean pooling. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`SimpleViTConfig`.
    """

    config_class = SimpleViTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        size: fields for size, fields in ViT.presets.items() if size
    }
