"""Compact transformers (Hassani et al. 2021, arXiv 2104.05704): CCT, CVT and ViT-Lite.

CCT: convolutional tokenizer -> positions -> blocks -> norm -> sequence pooling -> head. CVT ("CVT-
Lite" here, to distinguish it from the convolutional CvT) has a patch embedding instead of the
tokenizer; ViT-Lite also has a class token instead of the pooling.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from ..grid import TokenGrid
from .base import BACKBONES, Block
from .vit import Pool, ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CCTConfig(ViTConfig):
    """Configuration of :class:`CCT`: that of ViT with other defaults.

    ``patch_size`` is the product of the strides of the tokenizer, including its pools.
    """

    backbone: ClassVar[str] = "cct"
    patch_size: int | tuple[int, ...] = 2
    stem: str = "tokenizer"
    position_std: float = 0.2
    pool: Pool = "seq"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CVTLiteConfig(CCTConfig):
    """Configuration of :class:`CVTLite`: that of CCT without convolutions."""

    backbone: ClassVar[str] = "cvt_lite"
    patch_size: int | tuple[int, ...] = 4
    stem: str = "patch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTLiteConfig(CVTLiteConfig):
    """Configuration of :class:`ViTLite`: that of CVT with a class token."""

    backbone: ClassVar[str] = "vit_lite"
    pool: Pool = "cls"


class CCTBlock(Block):
    """y = norm(x + mixer(norm x)), then y + mlp(y): the MLP adds to normalized tokens.

    Shape: (B, N, D) -> (B, N, D)
    """

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``, with angles ``rope`` (N, A)."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), grid, rope)))
        if self.mlp is None:
            return x
        x = self.norm2(x)
        return x + self.drop_path(self.scale2(self.mlp(x)))


def _size(depth: int, **fields: Any) -> dict[str, Any]:
    """The sizes of the authors by depth, and what they share."""
    dim, heads, mlp_ratio = {
        2: (128, 2, 1.0),
        4: (128, 2, 1.0),
        6: (256, 4, 2.0),
        7: (256, 4, 2.0),
        14: (384, 6, 3.0),
    }[depth]
    return dict(
        dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio, drop_path=0.1,
        mixer_options={"dropout": 0.1}, **fields,
    )  # fmt: skip


def _tokens(kernel: int, layers: int, patch_size: int) -> dict[str, Any]:
    return dict(patch_size=patch_size, stem_options={"kernel": kernel, "layers": layers})


_FLOWERS = dict(input_shape=(3, 224, 224), num_classes=102)
_IMAGENET = dict(input_shape=(3, 224, 224), num_classes=1000)


@BACKBONES.register("cct")
class CCT(ViT):
    """CCT. The suffix after the depth is kernel size x layers of the tokenizer.

    Shape: (B, C, *shape) -> (B, num_classes)

    Args:
        config: see :class:`CCTConfig`.
    """

    config_class = CCTConfig
    block_class = CCTBlock
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # three convolutions and one token per pixel, as in the scripts of the X-formers paper
        "": dict(patch_size=1, stem_options={"layers": 3, "pool_stride": 1}),
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
class CVTLite(CCT):
    """CVT. The suffix after the depth is the patch size.

    Shape: (B, C, *shape) -> (B, num_classes)

    Args:
        config: see :class:`CVTLiteConfig`.
    """

    config_class = CVTLiteConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        f"{depth}_4": _size(depth) for depth in (2, 4, 6, 7)
    }


@BACKBONES.register("vit_lite")
class ViTLite(CCT):
    """ViT-Lite. The suffix after the depth is the patch size.

    Shape: (B, C, *shape) -> (B, num_classes)

    Args:
        config: see :class:`ViTLiteConfig`.
    """

    config_class = ViTLiteConfig
    presets = CVTLite.presets
