"""CaiT (Touvron et al. 2021, arXiv 2103.17239) with any mixer.

Pixels -> stem -> positions -> blocks with layer scale -> blocks of class attention, in which the
class token alone changes -> norm -> head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import KERNELS
from ..layout import Layout
from ..mixers import ClassSlot, create_mixer
from ..registry import check_at_least
from .base import BACKBONES, Block, init_linears
from .vit import Isotropic, IsotropicConfig


class ClassBlock(Block):
    """A block whose mixer asks for the first token alone: (B, 1, D), (B, N, D) -> (B, 1, D)."""

    def forward(self, token: Tensor, x: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """``layout``: of the token and x together."""
        y = self.mixer(self.norm1(torch.cat((token, x), 1)), layout)
        token = token + self.drop_path(self.scale1(y))
        if self.mlp is None:
            return token
        return token + self.drop_path(self.scale2(self.mlp(self.norm2(token))))


def check_class_mixer(field: str, name: str) -> None:
    """Raise a ValueError for a mixer in which no class token can ask."""
    if name not in KERNELS:
        asks = [other for other in KERNELS.names() if KERNELS[other].takes_one_query]
        raise ValueError(
            f"{field} {name!r} has no query that a class token could ask: take "
            f"{' or '.join(map(repr, asks))}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaiTConfig(IsotropicConfig):
    """As :class:`~vision_xformer.backbones.vit.IsotropicConfig`, and:

    Args:
        class_depth: blocks of class attention.
        class_heads: heads of it.
        class_mixer, class_options: mixer of it, with queries and keys, and its options; it is
            linear in N as it is.
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


def _size(dim: int, depth: int, **fields: Any) -> dict[str, Any]:
    heads = dim // 48
    return dict(
        input_shape=(3, 224, 224), num_classes=1000, patch=16, dim=dim, depth=depth, heads=heads,
        class_heads=heads, mlp_dim=4 * dim, norm_eps=1e-6, mixer_options={"qkv_bias": True},
        class_options={"qkv_bias": True},
    ) | fields  # fmt: skip


@BACKBONES.register("cait")
class CaiT(Isotropic):
    """
    Args:
        config: see :class:`CaiTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = CaiTConfig
    config: CaiTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": dict(
            input_shape=(3, 14, 10), num_classes=5, patch=2, dim=24, depth=2, heads=3, mlp_dim=38,
            class_depth=1, class_heads=2, layer_scale=0.5,
        ),
        "xxs24": _size(192, 24),
        "xxs36": _size(192, 36),
        "xs24": _size(288, 24, input_shape=(3, 384, 384)),
        "s24": _size(384, 24),
    }  # fmt: skip

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__(config)
        c = config
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.dim) * 0.02)
        self.class_layout = self.layout._replace(prefix=self.layout.prefix + 1)
        self.class_blocks = nn.ModuleList(
            ClassBlock(
                create_mixer(
                    c.class_mixer,
                    dim=c.dim,
                    heads=c.class_heads,
                    layout=self.class_layout,
                    slot=ClassSlot(),
                    **c.class_options,
                ),
                c.mlp_dim,
                dropout=c.dropout,
                drop_path=0.0,
                layer_scale=c.layer_scale,
                norm_eps=c.norm_eps,
            )
            for _ in range(c.class_depth)
        )
        init_linears(self.class_blocks)
        self.norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.head = self.make_head(c.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N + 1, D), the class token in front."""
        x = self.mix(x)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.class_blocks:
            token = self.run(block, token, x, self.class_layout)
        y: Tensor = self.norm(torch.cat((token, x), 1))
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N + 1, D) -> (B, num_classes); the class token (B, D) with ``pre_logits``."""
        x = x[:, 0]
        y: Tensor = x if pre_logits else self.head(x)
        return y
