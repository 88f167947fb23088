"""CrossViT (Chen et al. 2021, arXiv 2103.14899) with any mixer.

Two branches see the picture in patches of two sizes. After some blocks of its own, the class token
of each asks the tokens of the other (section 3.3). The logits are the mean of both branches'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Layout
from ..mixers import ClassSlot, create_mixer, takes_heads
from ..positions import LearnedPosition
from ..registry import check_at_least
from ..stems import PatchStem, check_input_shape
from .base import BACKBONES, Backbone, Block, Config, check_stages, drop_paths, init_linears
from .cait import ClassBlock, check_class_mixer

_RESIZE = {1: "linear", 2: "bicubic", 3: "trilinear"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossViTConfig(Config):
    """
    Args:
        patches: pixels for each token of the two branches, on each axis.
        scales: to which each branch resizes the picture, of its size.
        dims, depths, heads: width D, blocks between two exchanges and heads of the branches; heads
            is None for a mixer without heads.
        stages: number of exchanges.
        mlp_ratio: hidden width of the MLPs for a width of 1.
        mixer, mixer_options: token mixer of the branches by name and its options.
        cross_heads: heads of the exchange, by the branch that is asked.
        cross_mixer, cross_options: mixer of the exchange, with queries and keys, and its options;
            it is linear in N as it is.
        position_std: standard deviation of the learned positions at first.
        dropout: in the MLP. drop_path: stochastic depth, rising linearly to the last stage.
        norm_eps: epsilon of the layer norms.
    """

    backbone: ClassVar[str] = "crossvit"
    patches: tuple[int, ...] = (12, 16)
    scales: tuple[float, ...] = (1.0, 224 / 240)
    dims: tuple[int, ...] = (96, 192)
    depths: tuple[int, ...] = (1, 4)
    heads: tuple[int, ...] | None = (3, 3)
    stages: int = 3
    mlp_ratio: int = 4
    mixer: str = "softmax"
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    cross_heads: tuple[int, ...] = (3, 3)
    cross_mixer: str = "softmax"
    cross_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    position_std: float = 0.02
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_input_shape(self.input_shape)
        if len(self.dims) != 2:
            raise ValueError(f"dims {self.dims} must be the widths of two branches")
        if len(self.scales) != 2 or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales {self.scales} must be two numbers above 0")
        check_class_mixer("cross_mixer", self.cross_mixer)
        names = ["dims", "depths", "patches", "cross_heads"]
        if takes_heads(self.mixer):
            names.append("heads")
        elif self.heads is not None:
            raise ValueError(f"mixer {self.mixer!r} has no heads: heads must be None")
        check_stages(self, names)
        for name in ("stages", "mlp_ratio"):
            check_at_least(name, getattr(self, name), 1)


class Branch(nn.Module):
    """Pixels -> resized -> patches -> class token -> positions: (B, C, *shape) -> (B, N, D).

    Attributes:
        layout: of its tokens.
    """

    def __init__(self, config: CrossViTConfig, index: int) -> None:
        super().__init__()
        c, dim = config, config.dims[index]
        channels, *shape = c.input_shape
        self.shape = tuple(int(size * c.scales[index]) for size in shape)
        try:
            self.stem = PatchStem((channels, *self.shape), c.patches[index], dim)
        except ValueError as error:
            raise ValueError(f"at scale {c.scales[index]} of branch {index + 1}: {error}") from None
        self.layout = Layout(self.stem.grid, 1)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = LearnedPosition(self.layout, dim, c.position_std)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != torch.Size(self.shape):
            x = F.interpolate(x, self.shape, mode=_RESIZE[len(self.shape)], align_corners=False)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        return torch.cat((token, self.stem(x)), 1) + self.position()


class Exchange(nn.Module):
    """The class token of one branch asks the tokens of the other.

    (B, 1, D), (B, N, E) -> (B, 1, D). It goes there through a norm, GELU and a linear map, and back
    through others.
    """

    def __init__(self, config: CrossViTConfig, asks: int, layout: Layout, drop_path: float) -> None:
        super().__init__()
        c, asked = config, 1 - asks
        self.there, self.back = (
            nn.Sequential(nn.LayerNorm(a, c.norm_eps), nn.GELU(), nn.Linear(a, b))
            for a, b in ((c.dims[asks], c.dims[asked]), (c.dims[asked], c.dims[asks]))
        )
        mixer = create_mixer(
            c.cross_mixer,
            dim=c.dims[asked],
            heads=c.cross_heads[asked],
            layout=layout,
            slot=ClassSlot(),
            **c.cross_options,
        )
        self.block = ClassBlock(
            mixer, 0, dropout=0.0, drop_path=drop_path, layer_scale=None, norm_eps=c.norm_eps
        )
        self.layout = layout

    def forward(self, token: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.block(self.there(token), x, self.layout))
        return y


class CrossStage(nn.Module):
    """Blocks of each branch, then the exchange: two of (B, N, D) -> two of the same.

    It calls its blocks through ``run``, see :meth:`Backbone.run`.
    """

    def __init__(self, config: CrossViTConfig, layouts: list[Layout], rates: list[float]) -> None:
        super().__init__()
        c, self.layouts = config, layouts

        def block(index: int, rate: float) -> Block:
            mixer = create_mixer(
                c.mixer,
                dim=c.dims[index],
                heads=None if c.heads is None else c.heads[index],
                layout=layouts[index],
                **c.mixer_options,
            )
            return Block(
                mixer,
                c.mlp_ratio * c.dims[index],
                dropout=c.dropout,
                drop_path=rate,
                layer_scale=None,
                norm_eps=c.norm_eps,
            )

        self.branches = nn.ModuleList(
            nn.ModuleList(block(index, rate) for rate in rates[: c.depths[index]])
            for index in range(2)
        )
        self.exchanges = nn.ModuleList(
            Exchange(c, asks, layouts[1 - asks], rates[-1]) for asks in range(2)
        )

    def forward(self, xs: list[Tensor], run: Callable[..., Tensor]) -> list[Tensor]:
        xs = list(xs)
        for index, blocks in enumerate(self.branches):
            for block in blocks.children():
                xs[index] = run(block, xs[index], self.layouts[index], None)
        tokens = [
            run(exchange, xs[asks][:, :1], xs[1 - asks][:, 1:])
            for asks, exchange in enumerate(self.exchanges)
        ]
        return [torch.cat((token, x[:, 1:]), 1) for token, x in zip(tokens, xs, strict=True)]


class BranchHeads(nn.Module):
    """A head for each branch: (B, D + E) -> (B, num_classes), their mean."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([head.in_features for head in self.heads], -1)
        logits = [head(part) for head, part in zip(self.heads, parts, strict=True)]
        mean: Tensor = (logits[0] + logits[1]) / 2
        return mean


def _size(dim: int, heads: int, depth: int, mlp_ratio: int) -> dict[str, Any]:
    return dict(
        dims=(dim, 2 * dim), heads=(heads, heads), cross_heads=(heads, heads), depths=(1, depth),
        mlp_ratio=mlp_ratio, input_shape=(3, 240, 240), num_classes=1000,
        mixer_options={"qkv_bias": True}, cross_options={"qkv_bias": True},
    )  # fmt: skip


@BACKBONES.register("crossvit")
class CrossViT(Backbone):
    """
    Args:
        config: see :class:`CrossViTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = CrossViTConfig
    config: CrossViTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "test": dict(
            input_shape=(3, 20, 12), num_classes=5, patches=(2, 3), scales=(1.0, 0.75),
            dims=(12, 20), depths=(1, 2), heads=(3, 2), cross_heads=(2, 5), stages=2, mlp_ratio=2,
        ),
        "tiny": _size(96, 3, 4, 4),
        "small": _size(192, 6, 4, 4),
        "base": _size(384, 12, 4, 4),
        "9": _size(128, 4, 3, 3),
        "15": _size(192, 6, 5, 3),
        "18": _size(224, 7, 6, 3),
    }  # fmt: skip

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__(config)
        c = config
        self.num_features = sum(c.dims)
        branches = [Branch(c, index) for index in range(2)]
        layouts = [branch.layout for branch in branches]
        self.branches = nn.ModuleList(branches)
        depth = max(c.depths)
        rates = drop_paths(c.drop_path, c.stages * depth)
        self.stages = nn.ModuleList(
            CrossStage(c, layouts, rates[stage * depth : (stage + 1) * depth])
            for stage in range(c.stages)
        )
        init_linears(self.stages)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, c.norm_eps) for dim in c.dims)
        self.head = self.make_head(c.num_classes)

    def make_head(self, num_classes: int) -> nn.Module:
        """A linear classifier for each branch; the identity for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        heads = BranchHeads([nn.Linear(dim, num_classes) for dim in self.config.dims])
        init_linears(heads)
        return heads

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, *shape) -> (B, 1, D + E): the class tokens of both branches side by side."""
        self.check_input(x)
        xs = [branch(x) for branch in self.branches]
        for stage in self.stages:
            xs = stage(xs, self.run)
        return torch.cat([norm(y[:, :1]) for norm, y in zip(self.norms, xs, strict=True)], -1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1, D + E) -> (B, num_classes); the pooled (B, D + E) with ``pre_logits``."""
        x = x[:, 0]
        y: Tensor = x if pre_logits else self.head(x)
        return y
