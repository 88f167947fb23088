"""LeViT (Graham et al. 2021, arXiv 2104.01136) with any mixer.

Pixels -> convolutions -> stages of blocks, an attention that shrinks the grid between them -> mean
-> head. Batch norm instead of layer norm throughout, so that it can be folded away for inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..layers import ConvNorm, LinearNorm, NormLinear
from ..layout import Layout
from ..mixers import Mixer, NormSlot, create_mixer, mixer_options, takes_heads
from ..registry import check_at_least
from ..stems import STEMS
from .base import BACKBONES, Backbone, Config, check_stages, init_linears, make_drop_path, make_rope

_IMAGENET = dict(input_shape=(3, 224, 224), num_classes=1000, distilled=True)
_KEY32 = dict(key_dim=32, depths=(4, 4, 4), **_IMAGENET)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeViTConfig(Config):
    """
    Args:
        patch: pixels for each token of the first stage, one size or one for each axis.
        stem_layers: convolutions that share the patch's strides.
        dims, depths, heads: width D, number of blocks and heads of each stage; heads is None for a
            mixer without heads.
        key_dim: key width K per head; None for a mixer without heads. The shrinking attention has
            D / K heads.
        value_ratio: value width per head for a key width of 1, twice that where the grid shrinks;
            for mixers with values.
        mlp_ratio: hidden width of the MLPs for a width of 1.
        mixer, mixer_options: token mixer by name and its options.
        position_bias: whether logits get a learned bias for each distance; False for a mixer that
            forms no attention map.
        rope: rotary positions, "axial" or "raster", or None.
        drop_path: probability with which a sample skips a branch.
        distilled: whether there is a second head, for a teacher's labels (section 4.1).
        fused: whether the batch norms are folded into the maps, see :meth:`LeViT.fuse`.
    """

    backbone: ClassVar[str] = "levit"
    patch: int | tuple[int, ...] = 16
    stem_layers: int = 4
    dims: tuple[int, ...] = (128, 256, 384)
    depths: tuple[int, ...] = (2, 3, 4)
    heads: tuple[int, ...] | None = (4, 6, 8)
    key_dim: int | None = 16
    value_ratio: int = 2
    mlp_ratio: int = 2
    mixer: str = "softmax"
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    position_bias: bool = True
    rope: str | None = None
    drop_path: float = 0.0
    distilled: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ["dims", "depths"]
        if takes_heads(self.mixer):
            if self.key_dim is None:
                raise ValueError(f"mixer {self.mixer!r} needs heads and key_dim")
            check_at_least("key_dim", self.key_dim, 1)
            names.append("heads")
        elif self.heads is not None or self.key_dim is not None:
            raise ValueError(f"mixer {self.mixer!r} has no heads: heads and key_dim must be None")
        check_stages(self, names)
        if "head_dim" in self.mixer_options:
            raise ValueError("head_dim in mixer_options is key_dim in LeViT: set that")
        check_at_least("value_ratio", self.value_ratio, 1)
        check_at_least("mlp_ratio", self.mlp_ratio, 1)


class LeViTBlock(nn.Module):
    """x + mixer(x), then x + mlp(x); without the first x where the mixer shrinks the grid."""

    def __init__(
        self, mixer: Mixer, dim: int, mlp_ratio: int, drop_path: float, shrinks: bool
    ) -> None:
        super().__init__()
        self.mixer, self.shrinks = mixer, shrinks
        self.mlp = nn.Sequential(
            LinearNorm(dim, mlp_ratio * dim), nn.Hardswish(), LinearNorm(mlp_ratio * dim, dim, 0.0)
        )
        self.drop_path = make_drop_path(drop_path)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None) -> Tensor:
        y = self.mixer(x, layout, rope)
        x = y if self.shrinks else x + self.drop_path(y)
        return x + self.drop_path(self.mlp(x))


class LeViTStage(nn.Module):
    """The blocks of one grid, then the one that shrinks it, but for the last stage.

    (B, N, D) -> (B, n, E). It calls its blocks through ``run``, see :meth:`Backbone.run`.
    """

    def __init__(self, config: LeViTConfig, index: int, layout: Layout) -> None:
        super().__init__()
        c, self.layout = config, layout
        dim, next_dim = c.dims[index], (*c.dims, 0)[index + 1]

        def block(heads: int | None, slot: NormSlot) -> LeViTBlock:
            options = dict(c.mixer_options)
            if c.key_dim is not None and "head_dim" in mixer_options(c.mixer):
                options["head_dim"] = c.key_dim
            mixer = create_mixer(c.mixer, dim=dim, heads=heads, layout=layout, slot=slot, **options)
            return LeViTBlock(mixer, slot.out_dim or dim, c.mlp_ratio, c.drop_path, slot.stride > 1)

        heads = None if c.heads is None else c.heads[index]
        slot = NormSlot(c.value_ratio, c.position_bias)
        blocks = [block(heads, slot) for _ in range(c.depths[index])]
        self.blocks = nn.ModuleList(blocks)
        self.shrink: LeViTBlock | None = None
        if next_dim:
            heads = None if c.key_dim is None else max(1, dim // c.key_dim)
            slot = NormSlot(2 * c.value_ratio, c.position_bias, stride=2, out_dim=next_dim)
            self.shrink = block(heads, slot)
        self.rope = make_rope(c.rope, blocks[0].mixer, c.mixer)

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        rope = None if self.rope is None else self.rope()
        for block in self.blocks:
            x = run(block, x, self.layout, rope)
        return x if self.shrink is None else run(self.shrink, x, self.layout, rope)


class DistilledHead(nn.Module):
    """Two heads, one for the labels and one for a teacher's (Touvron et al. 2020): their mean.

    With ``separate``, training gets both: (B, D) -> two of (B, num_classes).
    """

    def __init__(self, labels: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.labels, self.teacher = labels, teacher
        self.separate: bool = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels, teacher = self.labels(x), self.teacher(x)
        if self.separate and self.training:
            return labels, teacher
        mean: Tensor = (labels + teacher) / 2
        return mean


@BACKBONES.register("levit")
class LeViT(Backbone):
    """
    Args:
        config: see :class:`LeViTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = LeViTConfig
    config: LeViTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # the paper's width and depth, a token for each pixel, and an attention that shrinks
        "": dict(patch=1, stem_layers=3, dims=(128, 128), depths=(2, 2), heads=(4, 4)),
        "test": dict(
            input_shape=(3, 14, 10), num_classes=5, patch=2, stem_layers=2, dims=(12, 20),
            depths=(2, 1), heads=(3, 2), key_dim=4,
        ),
        "128s": _IMAGENET,
        "128": dict(depths=(4, 4, 4), heads=(4, 8, 12), **_IMAGENET),
        "192": dict(dims=(192, 288, 384), heads=(3, 5, 6), **_KEY32),
        "256": dict(dims=(256, 384, 512), heads=(4, 6, 8), **_KEY32),
        "384": dict(dims=(384, 512, 768), heads=(6, 9, 12), drop_path=0.1, **_KEY32),
    }  # fmt: skip

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = c.dims[-1]
        stem = {"layers": c.stem_layers}
        self.stem = STEMS.create("levit", c.input_shape, c.patch, c.dims[0], options=stem)
        layout = Layout(self.stem.grid)
        stages = []
        for index in range(len(c.dims)):
            stages.append(LeViTStage(c, index, layout))
            layout = layout.strided(2)
        self.stages = nn.ModuleList(stages)
        init_linears(self.stages)
        self.head = self.make_head(c.num_classes)
        if c.fused:
            self.fuse()

    def make_head(self, num_classes: int) -> nn.Module:
        """Batch norm and a linear classifier, or two of them; the identity for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        heads: list[nn.Module] = []
        for _ in range(1 + self.config.distilled):
            head = NormLinear(self.num_features, num_classes)
            init_linears(head)
            heads.append(head.fused() if self.config.fused else head)
        if not self.config.distilled:
            return heads[0]
        both = DistilledHead(*heads)
        before = getattr(self, "head", None)
        both.separate = isinstance(before, DistilledHead) and before.separate
        return both

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training return the two heads' logits apart, for a loss of their own each."""
        if not isinstance(self.head, DistilledHead):
            raise ValueError(
                f"there is no second head to train: distilled is {self.config.distilled} and "
                f"num_classes {self.config.num_classes}"
            )
        self.head.separate = enable

    @torch.no_grad()
    def fuse(self) -> Self:
        """Fold each batch norm into the map beside it, in place: for inference.

        The logits of evaluation stay the same; training goes on without normalisation.
        """
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, ConvNorm | LinearNorm | NormLinear):
                    setattr(module, name, child.fused())
        self.config = dataclasses.replace(self.config, fused=True)
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, N, D), N and D those of the last stage."""
        self.check_input(x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, self.run)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes); the pooled (B, D) with ``pre_logits``."""
        x = x.mean(1)
        y: Tensor = x if pre_logits else self.head(x)
        return y
