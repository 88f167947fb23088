"""Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) with any mixer and stem.

Pixels -> stem -> class and register tokens -> positions -> blocks -> norm -> pool -> head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..layers import SequencePool, drop_paths, init_linears
from ..mixers import Mixer, create_mixer
from ..mixers.factorized import space_time
from ..options import check_at_least, check_types
from ..positions import PositionKind, RopeKind, make_position
from ..stems import STEMS
from .base import BACKBONES, Block, Stage, VisionModel, check_prefix, make_rope
from .config import BlockConfig, Config

_IMAGENET = dict(  # what the sizes of Touvron et al. 2020 (DeiT) share
    input_shape=(3, 224, 224), num_classes=1000, patch_size=16, depth=12, mlp_ratio=4.0,
    norm_eps=1e-6, mixer_options={"qkv_bias": True},
)  # fmt: skip
Pool = Literal["cls", "mean", "seq"]
POOLS: dict[str, Pool] = {"token": "cls", "avg": "mean"}  # by their names in timm


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsotropicConfig(BlockConfig):
    """Configuration of isotropic models, which keep one grid and one width throughout.

    Args:
        patch_size: pixels per token, one size or one for each axis.
        dim: width D.
        depth: number of blocks.
        heads: number of heads; None for a mixer without heads.
        mlp_ratio: ratio of the hidden width of the MLPs to D; 0 for blocks without an MLP.
        factorized: for video: mix within each frame, then over time (Arnab et al. 2021, model 3),
            instead of jointly.
        stem: stem by name: "patch", "conv" (hybrid), "tokenizer" (CCT), "levit", "fft" or "v0.2".
        stem_options: its options.
        position: added to the tokens: "learned", "sincos" (of each axis), "raster_sincos" (of the
            position in the sequence), "fourier" (a learned projection of sines) or "none".
        position_std: initial standard deviation of learned positions. Small patches need a larger
            one, or the position signal is drowned out.
        rope: rotary positions, "axial" or "raster", or None.
        emb_dropout: dropout after the positions.
        layer_scale: initial value of LayerScale, or None for none.
    """

    patch_size: int | tuple[int, ...] = 1
    dim: int = 128
    depth: int = 4
    heads: int | None = 4
    mlp_ratio: float = 2.0
    factorized: bool = False
    stem: str = "patch"
    stem_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    position: PositionKind = "learned"
    position_std: float = 0.02
    rope: RopeKind | None = None
    emb_dropout: float = 0.0
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dim", 1), ("depth", 1), ("mlp_ratio", 0)):
            check_at_least(name, getattr(self, name), least)
        if self.dropout and not self.mlp_ratio:
            raise ValueError(
                f"dropout {self.dropout} is that of the MLPs: with mlp_ratio 0 it must be 0"
            )
        if self.dynamic_size and self.stem == "fft":
            raise ValueError(
                "stem 'fft' is tied to one number of frequencies: dynamic_size must be False"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(IsotropicConfig):
    """Configuration of :class:`ViT`: that of isotropic models and the pooling.

    Args:
        pool: "cls" (class token), "mean", or "seq" (attention-weighted mean).
        class_token: whether there is one; by default with pool "cls" only.
        registers: number of register tokens (Darcet et al. 2023).
        pool_include_prefix: whether pool "mean" or "seq" includes class and register tokens, as in
            vision_xformer 0.2.0; otherwise it is over the patches only, as in timm.
        no_embed_class: whether class and register tokens have no position embedding.
        fc_norm: whether the norm follows the pool; by default with pool "mean" only.

    The last three are named as in timm.
    """

    backbone: ClassVar[str] = "vit"
    pool: Pool = "cls"
    class_token: bool | None = None
    registers: int = 0
    pool_include_prefix: bool = False
    no_embed_class: bool = False
    fc_norm: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "cls" and self.class_token is False:
            raise ValueError("pool='cls' needs a class token: class_token must not be False")
        check_at_least("registers", self.registers, 0)
        tokens = self.has_class_token or self.registers > 0
        if self.pool_include_prefix and (self.pool == "cls" or not tokens):
            raise ValueError(
                "pool_include_prefix=True needs pool 'mean' or 'seq' and class_token=True or "
                f"registers, not pool={self.pool!r}, class_token={self.has_class_token}, "
                f"registers={self.registers}"
            )
        if self.no_embed_class and (self.position == "none" or not tokens):
            raise ValueError(
                "no_embed_class=True needs positions and class_token=True or registers, not "
                f"position={self.position!r}, class_token={self.has_class_token}, "
                f"registers={self.registers}"
            )

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token."""
        return self.pool == "cls" if self.class_token is None else self.class_token

    @property
    def has_fc_norm(self) -> bool:
        """Whether the norm follows the pool."""
        return self.pool == "mean" if self.fc_norm is None else self.fc_norm

    @property
    def has_pool_weights(self) -> bool:
        """Whether the pool has weights."""
        return self.pool == "seq" and self.global_pool


class Isotropic(VisionModel):
    """What ViT and CaiT share: stem, prefix tokens, positions, blocks.

    Args:
        config: see :class:`IsotropicConfig`.
        prefix: names and counts of learned prefix tokens.
        embed_prefix: whether prefix tokens have a position embedding.
    """

    block_class: ClassVar[type[Block]] = Block
    config: IsotropicConfig

    def __init__(
        self, config: IsotropicConfig, prefix: dict[str, int], embed_prefix: bool = True
    ) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dim
        self.stem = STEMS.create(c.stem, c.input_shape, c.patch_size, c.dim, options=c.stem_options)
        self.grid = TokenGrid(self.stem.grid.shape, sum(prefix.values()) + self.stem.grid.prefix)
        self.prefix_names = [name for name, count in prefix.items() if count]
        for name, count in prefix.items():
            token = nn.Parameter(torch.randn(1, count, c.dim) * 0.02) if count else None
            self.register_parameter(name, token)
        self.embed_prefix = embed_prefix
        embedded = self.grid if embed_prefix else self.stem.grid
        self.position = make_position(c.position, embedded, c.dim, c.position_std)
        self.emb_drop = nn.Dropout(c.emb_dropout)
        blocks = self._blocks()
        init_linears(nn.ModuleList(blocks))
        self.blocks = Stage(blocks, self.grid, make_rope(c.rope, blocks[0].mixer, c.mixer))
        if self.grid.prefix:
            check_prefix(blocks, c.mixer, "use pool='mean', registers=0 and no stem 'fft'")

    def _blocks(self) -> list[Block]:
        """``depth`` blocks; a factorized one is a block over space and a block over time."""
        c = self.config
        make = functools.partial(create_mixer, c.mixer, dim=c.dim, heads=c.heads, **c.mixer_options)
        blocks = []
        for drop_path in self.drop_path_rates():
            mixers = [make(grid=self.grid)] if not c.factorized else self._space_time(make)
            for mixer in mixers:
                ratio = c.mlp_ratio if mixer is mixers[-1] else 0.0
                block = self.block_class(
                    mixer, ratio, dropout=c.dropout, drop_path=drop_path,
                    layer_scale=c.layer_scale, norm_eps=c.norm_eps,
                )  # fmt: skip
                blocks.append(block)
        return blocks

    def drop_path_rates(self) -> list[float]:
        """Stochastic depth of each block."""
        return drop_paths(self.config.drop_path, (self.config.depth,))[0]

    def _space_time(self, make: functools.partial[Mixer]) -> list[Mixer]:
        return space_time(lambda grid: make(grid=grid), self.grid, self.config.dynamic_size)

    def embed(self, x: Tensor) -> tuple[Tensor, TokenGrid]:
        """Compute tokens before the first block, (B, C, *shape) -> (B, N, D), and their grid."""
        cells = self.stem.grid_of(self.check_input(x))
        grid = self.grid._replace(shape=cells.shape)
        x = self.stem(x)
        if self.position is not None and not self.embed_prefix:
            x = x + self.position(x, cells)
        prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self.prefix_names]
        x = torch.cat([*prefix, x], 1) if prefix else x
        if self.position is not None and self.embed_prefix:
            x = x + self.position(x, grid)
        return self.emb_drop(x), grid


@BACKBONES.register("vit")
class ViT(Isotropic):
    """Vision Transformer. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`ViTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class: ClassVar[type[Config]] = ViTConfig
    config: ViTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "": {},
        "tiny": dict(dim=192, heads=3, **_IMAGENET),
        "small": dict(dim=384, heads=6, **_IMAGENET),
        "base": dict(dim=768, heads=12, **_IMAGENET),
    }

    def __init__(self, config: ViTConfig) -> None:
        c = config
        prefix = {"cls_token": int(c.has_class_token), "reg_token": c.registers}
        super().__init__(c, prefix, not c.no_embed_class)
        norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.norm = nn.Identity() if c.has_fc_norm else norm
        self.fc_norm = norm if c.has_fc_norm else nn.Identity()
        self.pool = SequencePool(c.dim) if c.has_pool_weights else None
        self.head = self.make_head(c.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a new one for ``num_classes``; 0 returns the pooled features.

        Args:
            num_classes: number of classes.
            global_pool: "token" for the class token, "avg" for the mean, "" for none, as in timm;
                None keeps the pooling. The norm stays before or after the pool.

        Raises:
            ValueError: for another pooling, "token" without a class token, or "" with classes.
        """
        given = {"num_classes": num_classes, "global_pool": global_pool}
        check_types(given, ViT.reset_classifier)
        before = self.config
        if global_pool:
            if global_pool not in POOLS:
                raise ValueError(f"global_pool {global_pool!r} must be 'token', 'avg', '' or None")
            c, pool = self.config, POOLS[global_pool]
            self.config = dataclasses.replace(
                c, pool=pool, class_token=c.has_class_token, fc_norm=c.has_fc_norm,
                pool_include_prefix=c.pool_include_prefix and pool != "cls", global_pool=True,
            )  # fmt: skip
        try:
            super().reset_classifier(num_classes, None if global_pool else global_pool)
        except ValueError:
            self.config = before
            raise
        if not self.config.has_pool_weights:
            self.pool = None
        elif self.pool is None:
            self.pool = SequencePool(self.config.dim).to(next(self.parameters()))

    def drop_head(self) -> None:
        """Remove the classifier and the norm and weights of its pool."""
        super().drop_head()
        self.fc_norm, self.pool = nn.Identity(), None

    def finish(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Normalize the tokens, prefix first: (B, N, D) -> (B, N, D)."""
        return self.norm(x)

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Pool the tokens: (B, N, D) -> (B, D)."""
        if self.config.pool == "cls":
            return x[:, 0]
        x = x if self.config.pool_include_prefix else x[:, self.grid.prefix :]
        return x.mean(1) if self.pool is None else self.pool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify tokens (B, N, D): (B, num_classes), or (B, D) with ``pre_logits``."""
        x = self.fc_norm(self.pool_tokens(x) if self.config.global_pool else x)
        return x if pre_logits else self.head(x)
