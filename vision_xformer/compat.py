"""The classes of vision_xformer 0.2.0, and those of the paper that it never shipped.

Signatures are those of 0.2.0, keyword-only and frozen; arguments after ``emb_dropout`` are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .backbones import fnet2d, vit
from .factory import input_shape_of
from .options import unknown_name_error
from .positions import RopeKind

Size = int | tuple[int, int]
Options = Mapping[str, Any] | None


def _config(
    image_size: Size, channels: int, pool: vit.Pool, stem: str, rope: RopeKind | None,
    options: dict[str, Any], more_options: Options, *, dim: int, mlp_dim: int, **fields: Any,
) -> vit.ViTConfig:  # fmt: skip
    """A configuration from the arguments of the classes of 0.2.0."""
    if pool == "seq":
        raise unknown_name_error("pool", pool, ("cls", "mean"))
    return vit.ViTConfig(
        input_shape=input_shape_of((channels, 0, 0), image_size, channels),
        pool=pool,
        class_token=True,
        pool_include_prefix=pool == "mean",
        stem=stem,
        position="learned" if rope is None else "none",
        position_std=1.0,
        rope=rope,
        mixer_options={**options, **(more_options or {})},
        dim=dim,
        mlp_ratio=mlp_dim / dim,
        **fields,
    )


class ViT(vit.ViT):
    """ViT by keyword arguments. Shape: (B, C, H, W) -> (B, num_classes).

    Args:
        image_size: pixels on both axes, or on each.
        patch_size: pixels per token on both axes, or on each.
        num_classes: width of the logits.
        dim: width D.
        depth: number of blocks.
        heads: number of heads.
        mlp_dim: hidden width of the MLPs.
        pool: "cls" or "mean"; there is a class token in either case, and it is part of the mean.
        channels: number of input channels C.
        dim_head: width K per head.
        dropout: dropout in the MLP and after the attention.
        emb_dropout: dropout after the positions.
        mixer: the implementation, here "softmax" or "softmax_eager".
        mixer_options: more of its options.
        stem: "patch", or "v0.2" to load checkpoints of 0.2.0; "conv" in the Hybrid classes.
        rope: "raster" (as in the paper) or "axial": rotate q and k instead of adding positions.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, pool: vit.Pool = "cls", channels: int = 3, dim_head: int = 64,
        dropout: float = 0.0, emb_dropout: float = 0.0, mixer: str = "softmax",
        mixer_options: Options = None, stem: str | None = None, rope: RopeKind | None = None,
    ) -> None:  # fmt: skip
        options = {"head_dim": dim_head, "proj_dropout": dropout}
        super().__init__(_config(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class ViL(vit.ViT):
    """Vision Linformer. Shape: (B, C, H, W) -> (B, num_classes).

    Arguments are those of :class:`~vision_xformer.compat.ViT` and the following.

    Args:
        k: number of projected keys and values.
        one_kv_head: share keys and values between all heads.
        share_kv: use the keys as values.
        dropout: dropout in the MLP and of attention weights.
        mixer: "linformer" or "linformer-pytorch".
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, k: int = 64, one_kv_head: bool = True, share_kv: bool = True,
        pool: vit.Pool = "cls", channels: int = 3, dim_head: int = 64, dropout: float = 0.0,
        emb_dropout: float = 0.0, mixer: str = "linformer", mixer_options: Options = None,
        stem: str | None = None, rope: RopeKind | None = None,
    ) -> None:  # fmt: skip
        options = {"rank": k, "one_kv_head": one_kv_head, "share_kv": share_kv,
                   "head_dim": dim_head, "dropout": dropout}  # fmt: skip
        super().__init__(_config(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class ViP(vit.ViT):
    """Vision Performer. Shape: (B, C, H, W) -> (B, num_classes).

    Arguments are those of :class:`~vision_xformer.compat.ViT`, except for the following.

    Args:
        dropout: dropout in the MLP.
        mixer: "performer" or "performer-pytorch".
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, pool: vit.Pool = "cls", channels: int = 3, dim_head: int = 64,
        dropout: float = 0.0, emb_dropout: float = 0.0, mixer: str = "performer",
        mixer_options: Options = None, stem: str | None = None, rope: RopeKind | None = None,
    ) -> None:  # fmt: skip
        options = {"head_dim": dim_head, "qkv_bias": True}
        super().__init__(_config(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class ViN(vit.ViT):
    """Vision Nyströmformer. Shape: (B, C, H, W) -> (B, num_classes).

    Arguments are those of :class:`~vision_xformer.compat.ViT` and the following.

    Args:
        num_landmarks: number of landmarks, see :class:`~vision_xformer.Nystrom`.
        dropout: dropout in the MLP.
        mixer: "nystrom" or "nystrom-attention".
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, num_landmarks: int = 64, pool: vit.Pool = "cls",
        channels: int = 3, dim_head: int = 64, dropout: float = 0.0, emb_dropout: float = 0.0,
        mixer: str = "nystrom", mixer_options: Options = None, stem: str | None = None,
        rope: RopeKind | None = None,
    ) -> None:  # fmt: skip
        options = {"head_dim": dim_head, "landmarks": num_landmarks}
        super().__init__(_config(
            image_size, channels, pool, stem or self.stem_name, rope, options, mixer_options,
            patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer=mixer))  # fmt: skip


class FNet(vit.ViT):
    """Fourier mixing. Shape: (B, C, H, W) -> (B, num_classes).

    Arguments are those of :class:`~vision_xformer.compat.ViT`, without heads.
    """

    stem_name = "patch"

    def __init__(
        self, *, image_size: Size, patch_size: Size, num_classes: int, dim: int, depth: int,
        mlp_dim: int, pool: vit.Pool = "cls", channels: int = 3, dropout: float = 0.0,
        emb_dropout: float = 0.0, mixer_options: Options = None, stem: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(_config(
            image_size, channels, pool, stem or self.stem_name, None, {}, mixer_options,
            patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=None,
            mlp_dim=mlp_dim, dropout=dropout, emb_dropout=emb_dropout, mixer="fourier",
        ))  # fmt: skip


class FNet2D(fnet2d.FNet2D):
    """Fourier mixing of the map. Shape: (B, 3, H, W) -> (B, num_classes), for any H and W.

    Args:
        num_classes: width of the logits.
        dim: width D, even.
        depth: number of blocks.
        mlp_dim: hidden width of the MLPs.
        dropout: dropout in the MLP.
    """

    def __init__(
        self, *, num_classes: int, dim: int, depth: int, mlp_dim: int, dropout: float = 0.0
    ) -> None:
        config = fnet2d.FNet2DConfig(
            num_classes=num_classes, dim=dim, depth=depth, mlp_ratio=mlp_dim / dim, dropout=dropout
        )
        super().__init__(config)


class HybridViT(ViT):
    """:class:`ViT` with the convolutional stem. Shape: (B, C, H, W) -> (B, num_classes)."""

    stem_name = "conv"


class HybridViL(ViL):
    """:class:`ViL` with the convolutional stem. Shape: (B, C, H, W) -> (B, num_classes)."""

    stem_name = "conv"


class HybridViP(ViP):
    """:class:`ViP` with the convolutional stem. Shape: (B, C, H, W) -> (B, num_classes)."""

    stem_name = "conv"


class HybridViN(ViN):
    """:class:`ViN` with the convolutional stem. Shape: (B, C, H, W) -> (B, num_classes)."""

    stem_name = "conv"


class HybridFNet(FNet):
    """:class:`FNet` with the convolutional stem. Shape: (B, C, H, W) -> (B, num_classes)."""

    stem_name = "conv"
