"""CrossViT (Chen et al. 2021, arXiv 2103.14899) with any mixer.

Two branches see the image in patches of two sizes. After the blocks of each stage, the class token
of one branch attends to the patches of the other (section 3.3). The logits of both are averaged.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import TokenGrid
from ..layers import drop_paths, init_linears
from ..mixers import create_mixer
from ..options import check_at_least
from ..positions import LearnedPosition
from ..stems import check_input_shape
from ..stems.base import PatchStem
from .base import BACKBONES, Block, Checkpointed, Stage, VisionModel
from .class_attention import ClassBlock, check_class_mixer, class_attention
from .config import BlockConfig, StageFields
from .timm_interface import Feature

_RESIZE = {1: "linear", 2: "bicubic", 3: "trilinear"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossViTConfig(StageFields, BlockConfig):
    """Configuration of :class:`CrossViT`.

    Args:
        patch_sizes: pixels per token of the two branches, on each axis.
        scales: scale at which each branch sees the image.
        dims: width D of each branch.
        depths: number of blocks of each branch in each stage.
        heads: number of heads of each branch; None for a mixer without heads.
        stages: number of stages, each of which ends with an exchange.
        cross_heads: number of heads of the exchange, per attended branch.
        cross_mixer: mixer of the exchange, with queries and keys; it is already linear in N.
        cross_options: its options.
        position_std: initial standard deviation of the learned positions.
    """

    backbone: ClassVar[str] = "crossvit"
    patch_sizes: tuple[int, ...] = (12, 16)
    scales: tuple[float, ...] = (1.0, 224 / 240)
    dims: tuple[int, ...] = (96, 192)
    depths: tuple[int, ...] = (1, 4)
    heads: tuple[int, ...] | None = (3, 3)
    stages: int = 3
    cross_heads: tuple[int, ...] = (3, 3)
    cross_mixer: str = "softmax"
    cross_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    position_std: float = 0.02
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_input_shape(self.input_shape)
        if len(self.dims) != 2:
            raise ValueError(f"dims {self.dims} must be the widths of two branches")
        if len(self.scales) != 2 or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales {self.scales} must be two numbers above 0")
        check_class_mixer("cross_mixer", self.cross_mixer)
        self.check_tied("cross_mixer", self.cross_mixer)
        self.check_stages(self.mixer, "patch_sizes", "cross_heads")
        for name in ("stages", "mlp_ratio"):
            check_at_least(name, getattr(self, name), 1)


class Branch(nn.Module):
    """Pixels -> resized -> patches -> class token -> positions.

    Shape: (B, C, *shape) -> (B, N, D)

    Args:
        config: of the model.
        index: which of the two branches.

    Attributes:
        grid: positions of the N tokens.

    Raises:
        ValueError: for a scaled image that the patch size does not divide.
    """

    def __init__(self, config: CrossViTConfig, index: int) -> None:
        super().__init__()
        c, dim = config, config.dims[index]
        self.scale = c.scales[index]
        try:
            self.stem = PatchStem(self.resized(c.input_shape), c.patch_sizes[index], dim)
        except ValueError as error:
            raise ValueError(f"at scale {c.scales[index]} of branch {index + 1}: {error}") from None
        self.grid = TokenGrid(self.stem.grid.shape, 1)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = LearnedPosition(self.grid, dim, c.position_std)

    def resized(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape (C, *shape) at the scale of the branch."""
        channels, *shape = input_shape
        return channels, *(int(size * self.scale) for size in shape)

    def forward(self, x: Tensor, input_shape: tuple[int, ...]) -> tuple[Tensor, TokenGrid]:
        """Embed images of that shape, (B, C, *shape) -> (B, N, D); returns the grid, too."""
        shape = self.resized(input_shape)
        cells = self.stem.grid_of(shape)
        if shape != input_shape:
            x = F.interpolate(x, shape[1:], mode=_RESIZE[len(cells.shape)], align_corners=False)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        grid = cells._replace(prefix=1)
        return torch.cat((token, self.stem(x)), 1) + self.position(x, grid), grid


class Exchange(nn.Module):
    """The class token of one branch attends to the tokens of the other.

    A norm, GELU and a linear layer project it to their width, and another three project it back.

    Shape: (B, 1, D), (B, N, E) -> (B, 1, D)

    Args:
        config: of the model.
        index: the branch of the class token.
        grid: positions of a class token and the tokens of the other branch.
        drop_path: probability with which a sample skips the attention.
    """

    def __init__(
        self, config: CrossViTConfig, index: int, grid: TokenGrid, drop_path: float
    ) -> None:
        super().__init__()
        c, other = config, 1 - index
        self.proj_in, self.proj_out = (
            nn.Sequential(nn.LayerNorm(a, c.norm_eps), nn.GELU(), nn.Linear(a, b))
            for a, b in ((c.dims[index], c.dims[other]), (c.dims[other], c.dims[index]))
        )
        mixer = class_attention(
            c.cross_mixer, c.cross_options, dim=c.dims[other], heads=c.cross_heads[other], grid=grid
        )
        self.block = ClassBlock(mixer, 0, drop_path=drop_path, norm_eps=c.norm_eps)

    def forward(self, token: Tensor, x: Tensor, grid: TokenGrid) -> Tensor:
        """Attend from the class token (B, 1, D) to ``x`` (B, N, E), on one grid: (B, 1, D)."""
        return self.proj_out(self.block(self.proj_in(token), x, grid))


class CrossStage(Checkpointed):
    """A stage of blocks for each branch, then the exchanges.

    Shape: two of (B, N, D) -> two of (B, N, D)

    Args:
        config: of the model.
        grids: positions of the tokens of both branches.
        rates: stochastic depth of each block.
    """

    def __init__(self, config: CrossViTConfig, grids: list[TokenGrid], rates: list[float]) -> None:
        super().__init__()
        c, self.grids = config, grids

        def block(branch: int, rate: float) -> Block:
            mixer = create_mixer(
                c.mixer, dim=c.dims[branch], heads=c.heads_of(branch), grid=grids[branch],
                **c.mixer_options,
            )  # fmt: skip
            return Block(mixer, c.mlp_ratio, dropout=c.dropout, drop_path=rate, norm_eps=c.norm_eps)

        self.branches = nn.ModuleList(
            Stage([block(branch, rate) for rate in rates[:depth]], grids[branch])
            for branch, depth in enumerate(c.depths)
        )
        self.exchanges = nn.ModuleList(
            Exchange(c, branch, grids[1 - branch], rates[-1]) for branch in range(2)
        )

    def out_grid(self, grids: list[TokenGrid]) -> list[TokenGrid]:
        """The grids of the tokens of both branches, which stay as they are."""
        return grids

    def forward(self, xs: list[Tensor], grids: list[TokenGrid] | None = None) -> list[Tensor]:
        """Apply the stage to both branches: two of (B, N, D) -> two of (B, N, D)."""
        grids = self.grids if grids is None else grids
        xs = [stage(x, grid) for stage, x, grid in zip(self.branches, xs, grids, strict=True)]
        tokens = [
            self.run(exchange, xs[branch][:, :1], xs[1 - branch][:, 1:], grids[1 - branch])
            for branch, exchange in enumerate(self.exchanges)
        ]
        return [torch.cat((token, x[:, 1:]), 1) for token, x in zip(tokens, xs, strict=True)]


class BranchHeads(nn.Module):
    """Average the logits of one head per branch. Shape: (B, D + E) -> (B, num_classes)."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """Classify both branches: (B, D + E) -> (B, num_classes)."""
        parts = x.split([head.in_features for head in self.heads], -1)
        logits = [head(part) for head, part in zip(self.heads, parts, strict=True)]
        return (logits[0] + logits[1]) / 2


def _size(dim: int, heads: int, depth: int, mlp_ratio: float) -> dict[str, Any]:
    return dict(
        dims=(dim, 2 * dim), heads=(heads, heads), cross_heads=(heads, heads), depths=(1, depth),
        mlp_ratio=mlp_ratio, input_shape=(3, 240, 240), num_classes=1000,
        mixer_options={"qkv_bias": True}, cross_options={"qkv_bias": True},
    )  # fmt: skip


@BACKBONES.register("crossvit")
class CrossViT(VisionModel):
    """CrossViT. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`CrossViTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class = CrossViTConfig
    config: CrossViTConfig
    pooled_by = "token"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
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
        grids = [branch.grid for branch in branches]
        self.branches = nn.ModuleList(branches)
        rates = drop_paths(c.drop_path, [max(c.depths)] * c.stages)
        self.stages = nn.ModuleList(CrossStage(c, grids, stage_rates) for stage_rates in rates)
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

    def embed(self, x: Tensor) -> tuple[list[Tensor], list[TokenGrid]]:
        """Embed the image in both branches: (B, C, *shape) -> two of (B, N, D), and their grids."""
        shape = self.check_input(x)
        xs, grids = zip(*(branch(x, shape) for branch in self.branches), strict=True)
        return list(xs), list(grids)

    def features(self) -> list[Feature]:
        """The tokens of the first branch after each stage, then those of the second."""
        c = self.config
        reductions = [round(p / s) for p, s in zip(c.patch_sizes, c.scales, strict=True)]
        return [
            Feature(f"stages.{layer}", layer, c.dims[branch], reductions[branch], norm, branch)
            for branch, norm in enumerate(self.norms)
            for layer in range(len(self.stages))
        ]

    def drop_norm(self) -> None:
        """Remove the final norms."""
        self.norms = nn.ModuleList(nn.Identity() for _ in self.norms)

    def finish(self, x: list[Tensor], grid: list[TokenGrid]) -> Tensor:
        """Put both class tokens side by side: two of (B, N, D) -> (B, 1, D + E)."""
        return torch.cat([norm(y[:, :1]) for norm, y in zip(self.norms, x, strict=True)], -1)

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Select the only token: (B, 1, D + E) -> (B, D + E)."""
        return x[:, 0]
