"""XCiT (El-Nouby et al. 2021, arXiv 2106.09681) with any mixer.

Pixels -> convolutional stem -> Fourier positions -> blocks of attention, local patch interaction
and MLP -> blocks of class attention -> norm -> head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..grid import TokenGrid, on_grid
from ..layers import BATCH_NORM, CONV, LayerScale
from ..mixers import Mixer
from ..positions import PositionKind
from .base import BACKBONES, Block
from .cait import CaiT, CaiTConfig, ClassStage
from .config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class XCiTConfig(CaiTConfig):
    """Configuration of :class:`XCiT`: that of CaiT, with other defaults.

    Args:
        tokens_norm: whether the second norm of class attention is applied to all tokens; otherwise
            to the class token only, as in the "nano" sizes.
    """

    backbone: ClassVar[str] = "xcit"
    mixer: str = "xca"
    layer_scale: float | None = 1.0
    stem: str = "levit"
    position: PositionKind = "fourier"
    tokens_norm: bool = True


class LocalInteraction(nn.Module):
    """Two depth-wise convolutions with GELU and batch norm in between: (B, D, *grid) -> same.

    Args:
        axes: number of axes of the grid.
        dim: width D.
    """

    def __init__(self, axes: int, dim: int) -> None:
        super().__init__()
        self.conv1 = CONV[axes](dim, dim, 3, padding=1, groups=dim)
        self.act, self.norm = nn.GELU(), BATCH_NORM[axes](dim)
        self.conv2 = CONV[axes](dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbors: (B, D, *grid) -> same."""
        return self.conv2(self.norm(self.act(self.conv1(x))))


class XCiTBlock(Block):
    """A block with local patch interaction before its MLP. Shape: (B, N, D) -> (B, N, D).

    Args:
        mixer: of width D.
        mlp_ratio: ratio of the hidden width of the MLP to D; 0 omits both MLP and interaction.
        options: see :class:`~vision_xformer.backbones.base.Block`.
    """

    def __init__(self, mixer: Mixer, mlp_ratio: float, **options: Any) -> None:
        super().__init__(mixer, mlp_ratio, **options)
        if self.mlp is not None:
            scale = options["layer_scale"]
            self.norm3 = nn.LayerNorm(mixer.dim, options["norm_eps"])
            self.local = LocalInteraction(len(mixer.grid.shape), mixer.dim)
            self.scale3 = nn.Identity() if scale is None else LayerScale(mixer.dim, scale)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``, with angles ``rope`` (N, A)."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), grid, rope)))
        if self.mlp is None:
            return x
        x = x + self.drop_path(self.scale3(on_grid(self.local, self.norm3(x), grid)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class XCiTClassBlock(Block):
    """Class attention as in the published models, which also updates the other tokens.

    Their norm is added to them, and the residual around the MLP doubles them. ``tokens_norm``
    says whether the second norm is applied to them.

    Shape: (B, N + 1, D) -> same
    """

    tokens_norm = True

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Update the tokens, the class token first: (B, N + 1, D) -> same."""
        y = self.norm1(x)
        x = x + self.scale1(torch.cat((self.mixer(y, grid), y[:, 1:]), 1))
        if self.mlp is None:
            return x
        token, rest = x[:, :1], x[:, 1:]
        if self.tokens_norm:
            rest = self.norm2(rest)
        token = self.norm2(token)
        return torch.cat((token + self.scale2(self.mlp(token)), 2 * rest), 1)


class XCiTClassStage(ClassStage):
    """Blocks that update a learned class token and the other tokens: (B, N, D) -> (B, N + 1, D)."""

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Add the class token in front of tokens on ``grid``: (B, N, D) -> (B, N + 1, D)."""
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        grid = grid._replace(prefix=grid.prefix + 1)
        for block in self.blocks:
            x = self.run(block, x, grid)
        return x


def _size(dim: int, heads: int, patch_size: int, **fields: Any) -> dict[str, Any]:
    layers = patch_size.bit_length() - 1
    return dict(
        input_shape=(3, 224, 224), num_classes=1000, patch_size=patch_size, dim=dim, depth=12,
        heads=heads, class_heads=heads, mlp_ratio=4.0, norm_eps=1e-6,
        stem_options={"layers": layers, "activation": "gelu"},
        mixer_options={"qkv_bias": True}, class_options={"qkv_bias": True},
    ) | fields  # fmt: skip


@BACKBONES.register("xcit")
class XCiT(CaiT):
    """Cross-covariance image transformer. Shape: (B, C, *shape) -> (B, num_classes).

    Args:
        config: see :class:`XCiTConfig`.

    Raises:
        ValueError: for values that do not fit together; it names the argument and the value.
    """

    config_class: ClassVar[type[Config]] = XCiTConfig
    block_class: ClassVar[type[Block]] = XCiTBlock
    class_block: ClassVar[type[Block]] = XCiTClassBlock
    class_stage_class: ClassVar[type[ClassStage]] = XCiTClassStage
    config: XCiTConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "nano_12_p16": _size(128, 4, 16, tokens_norm=False),
        "nano_12_p8": _size(128, 4, 8, tokens_norm=False),
        "tiny_12_p16": _size(192, 4, 16),
        "tiny_12_p8": _size(192, 4, 8),
        "small_12_p16": _size(384, 8, 16),
        "small_12_p8": _size(384, 8, 8),
    }

    def make_class_block(self, grid: TokenGrid) -> Block:
        """Create a block of class attention; ``grid`` includes the class token."""
        block = super().make_class_block(grid)
        assert isinstance(block, XCiTClassBlock)
        block.tokens_norm = self.config.tokens_norm
        return block

    def finish(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Compute the class token and prepend it: (B, N, D) -> (B, N + 1, D)."""
        return self.norm(x if self.class_stage is None else self.class_stage(x, grid))
