"""Class attention (CaiT, Touvron et al. 2021, arXiv 2103.17239, sec. 3): one token attends to all.

It is linear in N for any kernel, and shared by CaiT and CrossViT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels import KERNELS
from ..mixers import Mixer
from ..mixers.attention import Attention, SplitProjection
from ..mixers.factory import check_mixer, create_kernel
from .base import Block


class ClassProjection(SplitProjection):
    """The query of the first token alone; keys and values of all tokens.

    Args:
        dim: token width D.
        grid: positions of the N tokens, the class token first.
        widths: of q, k and v; of q and k if the values are the keys.
        bias: whether the layers have one.
    """

    def inputs(self, x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """The first token (B, 1, D), and all tokens (B, N, D) twice."""
        return x[:, :1], x, x

    def queries(self, grid: TokenGrid) -> TokenGrid:
        """The grid of the class token alone."""
        return _class_token(grid)

    def angles(self, rope: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """The angles (1, A) of the class token and (N, A) of all tokens."""
        return rope[:1], rope


def _class_token(grid: TokenGrid) -> TokenGrid:
    """The grid of one prefix token alone."""
    return TokenGrid((0,) * len(grid.shape), 1)


def check_class_mixer(field: str, name: str) -> None:
    """Raise a ValueError for a mixer without a query of its own for the class token."""
    if name not in KERNELS or not KERNELS[name].supports_single_query:
        good = [other for other in KERNELS.names() if KERNELS[other].supports_single_query]
        why = "pools its queries" if name in KERNELS else "has no queries"
        raise ValueError(
            f"{field} {name!r} {why}, so no class token can attend with it: use "
            f"{' or '.join(map(repr, good))}"
        )


def class_attention(
    name: str, options: Mapping[str, Any], *, dim: int, heads: int | None, grid: TokenGrid
) -> Mixer:
    """Attention of the first token to all tokens.

    Args:
        name: mixer by name, with queries and keys.
        options: of the mixer.
        dim: token width D.
        heads: number of heads.
        grid: positions of the N tokens, the class token first.

    Returns:
        A mixer (B, N, D) -> (B, 1, D).

    Raises:
        ValueError: for a mixer without queries, or one that pools them.
    """
    check_mixer(name, dim, heads, grid, options)
    check_class_mixer("mixer", name)
    kernel, own = create_kernel(name, dim, heads, _class_token(grid), grid, options)
    return Attention(
        ClassProjection(dim, grid, kernel.operand_widths, own.qkv_bias),
        kernel,
        nn.Linear(kernel.site.heads * kernel.site.value_dim, dim),
        **own.layers,
    )


class ClassBlock(Block):
    """A block that updates only the class token. Shape: (B, 1, D), (B, N, D) -> (B, 1, D)."""

    def forward(self, token: Tensor, x: Tensor, grid: TokenGrid) -> Tensor:  # type: ignore[override]
        """Attend from ``token`` (B, 1, D) to itself and ``x`` (B, N, D), on one grid: (B, 1, D)."""
        y = self.mixer(self.norm1(torch.cat((token, x), 1)), grid)
        token = token + self.drop_path(self.scale1(y))
        if self.mlp is None:
            return token
        return token + self.drop_path(self.scale2(self.mlp(self.norm2(token))))
