"""Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) with any mixer and stem.

Pixels -> stem -> class and register tokens -> positions -> depth x block -> norm -> pool -> head.
SimpleViT, MLP-Mixer and gMLP are that with other parts, and stand at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers import SequencePool
from ..layout import Layout
from ..mixers import Mixer, create_mixer
from ..mixers.along import space_time
from ..positions import make_position
from ..registry import check_at_least, unknown
from ..stems import STEMS
from .base import (
    BACKBONES,
    Backbone,
    Block,
    Config,
    check_prefix,
    drop_paths,
    init_linears,
    make_rope,
)

_IMAGENET = dict(  # what the sizes of Touvron et al. 2020 (DeiT) share
    input_shape=(3, 224, 224), num_classes=1000, patch=16, depth=12, norm_eps=1e-6,
    mixer_options={"qkv_bias": True},
)  # fmt: skip
POOLS = ("cls", "mean", "seq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsotropicConfig(Config):
    """Of models that keep one grid and one width throughout.

    Args:
        patch: pixels for each token, one size or one for each axis.
        dim, depth, heads, mlp_dim: width D, number of blocks, heads, hidden width of the MLP;
            heads is None for a mixer without heads, mlp_dim 0 for blocks without MLP.
        mixer, mixer_options: token mixer by name and its options.
        factorised: of frames, height and width, whether a mixer for each frame is followed by one
            over time (Arnab et al. 2021, model 3) in place of one over all.
        stem, stem_options: "patch", "conv" (hybrid), "tokenizer" (CCT) or "levit", and its options.
        position: "learned", "sincos" (of each axis), "raster_sincos" (of the place in the
            sequence) or "none", added to the tokens.
        position_std: standard deviation of learned positions at first. Small patches need large
            ones: a token of few pixels says little, and a faint position is lost beside it.
        rope: rotary positions, "axial" or "raster", or None.
        dropout: in the MLP. emb_dropout: after the positions. drop_path: stochastic depth of the
            last block, rising linearly from 0 at the first. A mixer's dropout is its option.
        layer_scale: first value of LayerScale, or None for none.
        norm_eps: epsilon of the layer norms.
    """

    patch: int | tuple[int, ...] = 1
    dim: int = 128
    depth: int = 4
    heads: int | None = 4
    mlp_dim: int = 256
    mixer: str = "softmax"
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    factorised: bool = False
    stem: str = "patch"
    stem_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    position: str = "learned"
    position_std: float = 0.02
    rope: str | None = None
    dropout: float = 0.0
    emb_dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dim", 1), ("depth", 1), ("mlp_dim", 0)):
            check_at_least(name, getattr(self, name), least)
        if self.dropout and not self.mlp_dim:
            raise ValueError(
                f"dropout {self.dropout} is that of the MLPs: with mlp_dim 0 it must be 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(IsotropicConfig):
    """As :class:`IsotropicConfig`, and:

    Args:
        pool: "cls" (class token), "mean", or "seq" (learned weighted mean).
        class_token: whether there is one; by default with pool "cls" only. Where there is one and
            pool is "mean" or "seq" it is pooled too, as in the published models; registers never.
        registers: number of register tokens (Darcet et al. 2023).
        fc_norm: whether the norm follows the pool; by default with pool "mean" only.
    """

    backbone: ClassVar[str] = "vit"
    pool: str = "cls"
    class_token: bool | None = None
    registers: int = 0
    fc_norm: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        if self.pool == "cls" and self.class_token is False:
            raise ValueError("pool='cls' needs a class token: class_token must not be False")
        check_at_least("registers", self.registers, 0)

    @property
    def has_class_token(self) -> bool:
        return self.pool == "cls" if self.class_token is None else self.class_token

    @property
    def has_fc_norm(self) -> bool:
        return self.pool == "mean" if self.fc_norm is None else self.fc_norm


class Isotropic(Backbone):
    """What ViT and CaiT share: stem, tokens in front, positions, blocks.

    Args:
        config: see :class:`IsotropicConfig`.
        tokens: how many learned tokens of which name stand in front.
    """

    block_class: ClassVar[type[Block]] = Block
    config: IsotropicConfig

    def __init__(self, config: IsotropicConfig, **tokens: int) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dim
        self.stem = STEMS.create(c.stem, c.input_shape, c.patch, c.dim, options=c.stem_options)
        self.layout = Layout(self.stem.grid, sum(tokens.values()) + self.stem.prefix)
        for name, count in tokens.items():
            token = nn.Parameter(torch.randn(1, count, c.dim) * 0.02) if count else None
            self.register_parameter(name, token)
        self.tokens = tuple(tokens)
        self.position: nn.Module | None = make_position(
            c.position, self.layout, c.dim, c.position_std
        )
        self.emb_drop = nn.Dropout(c.emb_dropout)
        blocks: list[Block] = []
        for drop_path in drop_paths(c.drop_path, c.depth):
            *first, last = self._mixers()
            blocks += [self._block(mixer, 0, drop_path) for mixer in first]
            blocks.append(self._block(last, c.mlp_dim, drop_path))
        self.blocks = nn.ModuleList(blocks)
        init_linears(self.blocks)
        self.rope = make_rope(c.rope, blocks[0].mixer, c.mixer)
        if self.layout.prefix:
            check_prefix(self.blocks, c.mixer, "take pool='mean', registers=0 and no stem 'fft'")

    def _mixers(self) -> list[Mixer]:
        c = self.config
        make = functools.partial(create_mixer, c.mixer, dim=c.dim, heads=c.heads, **c.mixer_options)
        if c.factorised:
            return space_time(lambda part: make(layout=part), self.layout)
        return [make(layout=self.layout)]

    def _block(self, mixer: Mixer, mlp_dim: int, drop_path: float) -> Block:
        c = self.config
        return self.block_class(
            mixer,
            mlp_dim,
            dropout=c.dropout,
            drop_path=drop_path,
            layer_scale=c.layer_scale,
            norm_eps=c.norm_eps,
        )

    def mix(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, D): all but the last norm."""
        self.check_input(x)
        x = self.stem(x)
        prefix = [t for t in (getattr(self, name) for name in self.tokens) if t is not None]
        x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in prefix), x], 1)
        if self.position is not None:
            x = x + self.position()
        x = self.emb_drop(x)
        rope = None if self.rope is None else self.rope()
        for block in self.blocks:
            x = self.run(block, x, self.layout, rope)
        return x


@BACKBONES.register("vit")
class VisionTransformer(Isotropic):
    """
    Args:
        config: see :class:`ViTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class: ClassVar[type[Config]] = ViTConfig
    hybrid = True
    config: ViTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "": {},
        "test": dict(
            input_shape=(3, 14, 10), num_classes=5, patch=2, dim=24, depth=2, heads=3, mlp_dim=38
        ),
        "tiny": dict(dim=192, heads=3, mlp_dim=768, **_IMAGENET),
        "small": dict(dim=384, heads=6, mlp_dim=1536, **_IMAGENET),
        "base": dict(dim=768, heads=12, mlp_dim=3072, **_IMAGENET),
    }

    def __init__(self, config: ViTConfig) -> None:
        c = config
        super().__init__(c, cls_token=int(c.has_class_token), reg_token=c.registers)
        norms = [nn.LayerNorm(c.dim, c.norm_eps), nn.Identity()]
        self.norm, self.fc_norm = reversed(norms) if c.has_fc_norm else norms
        self.pool = SequencePool(c.dim) if c.pool == "seq" else None
        self.head = self.make_head(c.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, D), class and register tokens in front."""
        y: Tensor = self.norm(self.mix(x))
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes); the pooled (B, D) with ``pre_logits``."""
        if self.config.pool == "cls":
            x = x[:, 0]
        else:
            classes = int(self.config.has_class_token)
            if self.layout.prefix > classes:
                x = torch.cat((x[:, :classes], x[:, self.layout.prefix :]), 1)
            x = x.mean(1) if self.pool is None else self.pool(x)
        x = self.fc_norm(x)
        y: Tensor = x if pre_logits else self.head(x)
        return y


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpleViTConfig(ViTConfig):
    """ViT as in "Better plain ViT baselines" (Beyer et al. 2022, arXiv 2205.01580)."""

    backbone: ClassVar[str] = "simple_vit"
    position: str = "sincos"
    pool: str = "mean"
    fc_norm: bool | None = False


@BACKBONES.register("simple_vit")
class SimpleViT(VisionTransformer):
    """Sines for positions, the mean of the normed tokens in place of a class token.

    Args:
        config: see :class:`SimpleViTConfig`.
    """

    config_class = SimpleViTConfig
    hybrid = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        size: fields for size, fields in VisionTransformer.presets.items() if size
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpMixerConfig(ViTConfig):
    """MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601)."""

    backbone: ClassVar[str] = "mixer"
    mixer: str = "mlp"
    heads: int | None = None
    position: str = "none"
    pool: str = "mean"
    fc_norm: bool | None = False


_TEST = dict(input_shape=(3, 14, 10), num_classes=5, patch=2, dim=24, depth=2)
_PATCH16 = dict(input_shape=(3, 224, 224), num_classes=1000, patch=16, norm_eps=1e-6)


@BACKBONES.register("mixer")
class MlpMixer(VisionTransformer):
    """ViT whose tokens are mixed by an MLP along the length.

    Args:
        config: see :class:`MlpMixerConfig`.
    """

    config_class: ClassVar[type[Config]] = MlpMixerConfig
    hybrid = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": dict(mlp_dim=38, **_TEST),
        "s32": {**_PATCH16, "patch": 32, "dim": 512, "depth": 8, "mlp_dim": 2048},
        "s16": dict(dim=512, depth=8, mlp_dim=2048, **_PATCH16),
        "b32": {**_PATCH16, "patch": 32, "dim": 768, "depth": 12, "mlp_dim": 3072},
        "b16": dict(dim=768, depth=12, mlp_dim=3072, **_PATCH16),
        "l16": dict(dim=1024, depth=24, mlp_dim=4096, **_PATCH16),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMlpConfig(MlpMixerConfig):
    """gMLP (Liu et al. 2021, arXiv 2105.08050)."""

    backbone: ClassVar[str] = "gmlp"
    mixer: str = "gmlp"
    mlp_dim: int = 0


@BACKBONES.register("gmlp")
class GatedMlpNetwork(MlpMixer):
    """MLP-Mixer whose blocks are one gated MLP each.

    Args:
        config: see :class:`GatedMlpConfig`.
    """

    config_class = GatedMlpConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": _TEST,
        **{
            f"{size}16": dict(dim=dim, depth=30, **_PATCH16)
            for size, dim in (("ti", 128), ("s", 256), ("b", 512))
        },
    }
