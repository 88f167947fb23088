"""The classes of the published package, and those of the paper that it never shipped.

Signatures are those of vision_xformer 0.2.0, keyword-only; what follows ``emb_dropout`` is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .backbones.fnet2d import FNet2DConfig, FourierNetwork2D
from .backbones.vit import VisionTransformer, ViTConfig
from .registry import unknown
from .zoo import input_shape_of

Size = int | tuple[int, int]
Options = Mapping[str, Any] | None


def _published(
    image_size: Size, channels: int, pool: str, stem: str, rope: str | None,
    options: dict[str, Any], more_options: Options, **fields: Any,
) -> ViTConfig:  # fmt: skip
    """A configuration from the arguments of the published classes."""
    if pool not in ("cls", "mean"):
        raise unknown("pool", pool, ("cls", "mean"))
    return ViTConfig(
        input_shape=input_shape_of((channels, 0, 0), image_size, channels),
        pool=pool,
        class_token=True,
        stem=stem,
        position="learned" if rope is None else "none",
        position_std=1.0,
        rope=rope,
        mixer_options={**options, **(more_options or {})},
        **fields,
    )


class ViT(VisionTransformer):
    """ViT by keyword arguments, in the manner of the published package's classes.

    Args:
        image_size, patch_size, channels: of the input; the sizes one for both axes or one each.
        num_classes, dim, depth, heads, mlp_dim, dim_head: as their names say.
        pool: "cls" or "mean"; there is a class token in either case, and it is part of the mean.
        dropout: in the MLP and after the attention. emb_dropout: after the positions.
        mixer: the implementation, here "softmax" or "softmax_eager".
        mixer_options: more of its options.
        stem: "patch", or "published" to load published checkpoints; "conv" in the Hybrid classes.
        rope: "raster" (the paper's) or "axial": rotate q and k instead of adding positions.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, pool: str = "cls", channels: int = 3, dim_head: int = 64,
        dropout: float = 0.0, emb_dropout: float = 0.0, mixer: str = "softmax",
        mixer_options: Options = None, stem: str | None = None, rope: str | None = None,
    ) -> None:  # fmt: skip
        options = {"head_dim": dim_head, "proj_dropout": dropout}
        super().__init__(_published(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class ViL(VisionTransformer):
    """Vision Linformer; arguments as :class:`ViT`, and:

    Args:
        k: keys and values that are left. one_kv_head, share_kv: see
            :class:`~vision_xformer.kernels.linformer.Linformer`.
        dropout: in the MLP and of attention weights.
        mixer: "linformer" or "linformer-pytorch".
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, k: int = 64, one_kv_head: bool = True, share_kv: bool = True,
        pool: str = "cls", channels: int = 3, dim_head: int = 64, dropout: float = 0.0,
        emb_dropout: float = 0.0, mixer: str = "linformer", mixer_options: Options = None,
        stem: str | None = None, rope: str | None = None,
    ) -> None:  # fmt: skip
        options = {"rank": k, "one_kv_head": one_kv_head, "share_kv": share_kv,
                   "head_dim": dim_head, "dropout": dropout}  # fmt: skip
        super().__init__(_published(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class ViP(VisionTransformer):
    """Vision Performer; arguments as :class:`ViT`, and:

    Args:
        dropout: in the MLP.
        mixer: "performer" or "performer-pytorch".
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, pool: str = "cls", channels: int = 3, dim_head: int = 64,
        dropout: float = 0.0, emb_dropout: float = 0.0, mixer: str = "performer",
        mixer_options: Options = None, stem: str | None = None, rope: str | None = None,
    ) -> None:  # fmt: skip
        options = {"head_dim": dim_head, "qkv_bias": True}
        super().__init__(_published(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class ViN(VisionTransformer):
    """Vision Nystromformer; arguments as :class:`ViT`, and:

    Args:
        num_landmarks: see :class:`~vision_xformer.kernels.nystrom.Nystrom`.
        dropout: in the MLP.
        mixer: "nystrom" or "nystrom-attention".
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, num_landmarks: int = 64, pool: str = "cls",
        channels: int = 3, dim_head: int = 64, dropout: float = 0.0, emb_dropout: float = 0.0,
        mixer: str = "nystrom", mixer_options: Options = None, stem: str | None = None,
        rope: str | None = None,
    ) -> None:  # fmt: skip
        options = {"head_dim": dim_head, "landmarks": num_landmarks}
        super().__init__(_published(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class FNet(VisionTransformer):
    """Fourier mixing; arguments as :class:`ViT`, without heads."""

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        mlp_dim: int, pool: str = "cls", channels: int = 3, dropout: float = 0.0,
        emb_dropout: float = 0.0, mixer_options: Options = None, stem: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(_published(
            image_size, channels, pool, stem or self.stem_name, None, {}, mixer_options,
            patch=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=None,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer="fourier",
        ))  # fmt: skip


class FNet2D(FourierNetwork2D):
    """Fourier mixing of the map, for images of three channels and any size.

    Args:
        num_classes, dim, depth, mlp_dim, dropout: see
            :class:`~vision_xformer.backbones.fnet2d.FNet2DConfig`.
    """

    def __init__(
        self, *, num_classes: int, dim: int, depth: int, mlp_dim: int, dropout: float = 0.0
    ) -> None:
        config = FNet2DConfig(
            num_classes=num_classes, dim=dim, depth=depth, mlp_dim=mlp_dim, dropout=dropout
        )
        super().__init__(config)


class HybridViT(ViT):
    """:class:`ViT` with the convolutional stem."""

    stem_name = "conv"


class HybridViL(ViL):
    """:class:`ViL` with the convolutional stem."""

    stem_name = "conv"


class HybridViP(ViP):
    """:class:`ViP` with the convolutional stem."""

    stem_name = "conv"


class HybridViN(ViN):
    """:class:`ViN` with the convolutional stem."""

    stem_name = "conv"


class HybridFNet(FNet):
    """:class:`FNet` with the convolutional stem."""

    stem_name = "conv"
