"""CaiT (Touvron et al. 2021, arXiv 2103.17239) with any mixer.

Pixels -> stem -> positions -> blocks with layer scale -> blocks of class attention, which update
only the class token -> norm -> head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..layers import init_linears
from ..options import check_at_least
from .base import BACKBONES, Block, Checkpointed
from .class_attention import ClassBlock, check_class_mixer, class_attention
from .config import Config
from .vit import Isotropic, IsotropicConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaiTConfig(IsotropicConfig):
    """Configuration of :class:`CaiT`: that of isotropic models and the class attention.

    Args:
        drop_path: stochastic depth of every block; those of class attention have none.
        class_depth: number of blocks of class attention.
        class_heads: their number of heads.
        class_mixer: their mixer, with queries and keys; class attention is already linear in N.
        class_options: its options.
    """

    backbone: ClassVar[str] = "cait"
    mixer: str = "talking_heads"
    layer_scale: float | None = 1e-5
    class_depth: int = 2
    class_heads: int = 4
    class_mixer: str = "softmax"
    class_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("class_depth", self.class_depth, 1)
        check_class_mixer("class_mixer", self.class_mixer)
        self.check_tied("class_mixer", self.class_mixer)


def _size(dim: int, depth: int, **fields: Any) -> dict[str, Any]:
    heads = dim // 48
    return dict(
        input_shape=(3, 224, 224), num_classes=1000, patch_size=16, dim=dim, depth=depth,
        heads=heads, class_heads=heads, mlp_ratio=4.0, norm_eps=1e-6,
        mixer_options={"qkv_bias": True}, class_options={"qkv_bias": True},
    ) | fields  # fmt: skip


class ClassStage(Checkpointed):
    """Blocks that update a learned class token from fixed tokens: (B, N, D) -> (B, 1, D).

    Args:
        blocks: blocks of class attention.
        dim: width D.
    """

    def __init__(self, blocks: Sequence[Block], dim: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Update the class token from tokens on ``grid``: (B, N, D) -> (B, 1, D)."""
        token = self.cls_token.expand(x.shape[0], -1, -1)
        grid = grid._replace(prefix=grid.prefix + 1)
        for block in self.blocks:
            token = self.run(block, token, x, grid)
        return token


@BACKBONES.register("cait")
class CaiT(Isotropic):
    """Class-attention image transformer. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`CaiTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class: ClassVar[type[Config]] = CaiTConfig
    class_block: ClassVar[type[Block]] = ClassBlock
    class_stage_class: ClassVar[type[ClassStage]] = ClassStage
    config: CaiTConfig
    pooled_by = "token"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "xxs24": _size(192, 24),
        "xxs36": _size(192, 36),
        "xs24": _size(288, 24, input_shape=(3, 384, 384)),
        "s24": _size(384, 24),
    }

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__(config, {})
        c = config
        grid = self.grid._replace(prefix=self.grid.prefix + 1)
        blocks = [self.make_class_block(grid) for _ in range(c.class_depth)]
        self.class_stage: ClassStage | None = self.class_stage_class(blocks, c.dim)
        init_linears(self.class_stage)
        self.norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.head = self.make_head(c.num_classes)

    def drop_path_rates(self) -> list[float]:
        """Stochastic depth of each block, the same for all."""
        return [self.config.drop_path] * self.config.depth

    def drop_head(self) -> None:
        """Remove the classifier and the class attention."""
        super().drop_head()
        self.class_stage = None

    def finish(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Compute the class token and prepend it: (B, N, D) -> (B, N + 1, D)."""
        if self.class_stage is None:
            return self.norm(x)
        return self.norm(torch.cat((self.class_stage(x, grid), x), 1))

    def make_class_block(self, grid: TokenGrid) -> Block:
        """Create a block of class attention; ``grid`` includes the class token."""
        c = self.config
        mixer = class_attention(
            c.class_mixer, c.class_options, dim=c.dim, heads=c.class_heads, grid=grid
        )
        return self.class_block(
            mixer, c.mlp_ratio, dropout=c.dropout, layer_scale=c.layer_scale, norm_eps=c.norm_eps
        )

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Select the class token, or average without one: (B, N, D) -> (B, D)."""
        return x.mean(1) if self.class_stage is None else x[:, 0]
