"""Compact transformers (Hassani et al. 2021, arXiv 2104.05704): CCT, CVT and ViT-Lite.

CCT: convolutional tokenizer -> positions -> blocks -> norm -> sequence pooling -> head. CVT ("CVT-
Lite" here, to tell it from the convolutional CvT) has linear patches instead of the tokenizer, and
ViT-Lite a class token instead of the pooling as well.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from ..layout import Layout
from .base import BACKBONES, Block
from .vit import VisionTransformer, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CCTConfig(ViTConfig):
    """As :class:`~vision_xformer.backbones.vit.ViTConfig`, with other defaults.

    ``patch`` is what the strides of the tokenizer come to, its pools included.
    """

    backbone: ClassVar[str] = "cct"
    patch: int | tuple[int, ...] = 2
    stem: str = "tokenizer"
    position_std: float = 0.2
    pool: str = "seq"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CVTLiteConfig(CCTConfig):
    """CCT without convolutions."""

    backbone: ClassVar[str] = "cvt_lite"
    patch: int | tuple[int, ...] = 4
    stem: str = "patch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTLiteConfig(CVTLiteConfig):
    """CVT with a class token."""

    backbone: ClassVar[str] = "vit_lite"
    pool: str = "cls"


class CCTBlock(Block):
    """y = norm(x + mixer(norm x)), then y + mlp(y): the second branch adds to the normed tokens."""

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), layout, rope)))
        if self.mlp is None:
            return x
        x = self.norm2(x)
        return x + self.drop_path(self.scale2(self.mlp(x)))


def _size(depth: int, **fields: Any) -> dict[str, Any]:
    """The authors' sizes by depth, and what they share."""
    dim, heads, mlp_dim = {
        2: (128, 2, 128),
        4: (128, 2, 128),
        6: (256, 4, 512),
        7: (256, 4, 512),
        14: (384, 6, 1152),
    }[depth]
    return dict(
        dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, drop_path=0.1,
        mixer_options={"dropout": 0.1}, **fields,
    )  # fmt: skip


def _tokens(kernel: int, layers: int, patch: int) -> dict[str, Any]:
    return dict(patch=patch, stem_options={"kernel": kernel, "layers": layers})


_FLOWERS = dict(input_shape=(3, 224, 224), num_classes=102)
_IMAGENET = dict(input_shape=(3, 224, 224), num_classes=1000)
_TEST = dict(input_shape=(3, 15, 9), num_classes=5, dim=24, depth=2, heads=3, mlp_dim=38)
_PATCHES = dict(input_shape=(3, 16, 12))


@BACKBONES.register("cct")
class CompactTransformer(VisionTransformer):
    """CCT. The number behind the depth is the tokenizer's: kernel x layers.

    Args:
        config: see :class:`CCTConfig`.
    """

    config_class = CCTConfig
    block_class = CCTBlock
    hybrid = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # three convolutions and a token for each pixel, as the scripts of the X-formers paper
        "": dict(patch=1, stem_options={"layers": 3, "pool_stride": 1}),
        "test": dict(**_tokens(3, 2, 4), **_TEST),
        "2_3x2": _size(2, **_tokens(3, 2, 4)),
        "4_3x2": _size(4, **_tokens(3, 2, 4)),
        "6_3x1": _size(6, **_tokens(3, 1, 2)),
        "6_3x2": _size(6, **_tokens(3, 2, 4)),
        "7_3x1": _size(7, **_tokens(3, 1, 2)),
        "7_3x2": _size(7, **_tokens(3, 2, 4)),
        "7_7x2": _size(7, **_tokens(7, 2, 16), **_FLOWERS),
        "14_7x2": _size(14, **_tokens(7, 2, 16), **_IMAGENET),
    }


@BACKBONES.register("cvt_lite")
class CompactVisionTransformer(CompactTransformer):
    """CVT. The number behind the depth is the patch.

    Args:
        config: see :class:`CVTLiteConfig`.
    """

    config_class = CVTLiteConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": {**_TEST, **_PATCHES},
        **{f"{depth}_4": _size(depth) for depth in (2, 4, 6, 7)},
    }


@BACKBONES.register("vit_lite")
class ViTLite(CompactTransformer):
    """ViT-Lite. The number behind the depth is the patch.

    Args:
        config: see :class:`ViTLiteConfig`.
    """

    config_class = ViTLiteConfig
    presets = CompactVisionTransformer.presets
