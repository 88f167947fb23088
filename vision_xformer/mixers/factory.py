"""Mixers by name. The name of a kernel stands for attention with that kernel."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..grid import TokenGrid
from ..kernels import KERNELS, Kernel, Site
from ..kernels.linformer import Linformer
from ..options import (
    check_at_least,
    check_options,
    check_types,
    options_of,
    unknown_name_error,
)
from .attention import Attention, LinearProjection, Projection, SplitProjection
from .base import MIXERS, Mixer, head_width
from .local import LocalKind


def list_mixers(pattern: str = "*") -> list[str]:
    """Names for :func:`create_mixer` that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter({*KERNELS.names(), *MIXERS.names()}, pattern))


def mixer_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a mixer, with defaults and types, by name.

    Raises:
        ValueError: for an unknown mixer.
    """
    if name in KERNELS:
        return options_of(attention_options) | options_of(KERNELS[name])
    return options_of(_mixer(name))


def _mixer(name: str) -> type[Mixer]:
    """The class of a mixer that is not a kernel; the error for an unknown name lists both."""
    if name not in MIXERS:
        raise unknown_name_error("mixer", name, list_mixers())
    return MIXERS[name]


def takes_heads(name: str) -> bool:
    """Whether the mixer of that name has heads."""
    return name in KERNELS or _mixer(name).takes_heads


def is_fixed(name: str) -> bool:
    """Whether the mixer of that name has parameters whose size depends on the number of tokens."""
    return KERNELS[name].fixed if name in KERNELS else _mixer(name).fixed


def takes_rope(name: str) -> bool:
    """Whether the mixer of that name has queries and keys that can be rotated."""
    return KERNELS[name].takes_rope if name in KERNELS else _mixer(name).rope_dim is not None


def takes_bias(name: str) -> bool:
    """Whether the mixer of that name has an attention map that a position bias can be added to."""
    return name in KERNELS and KERNELS[name].takes_bias


class AttentionOptions(NamedTuple):
    """The options of attention with any kernel, see :func:`attention_options`."""

    head_dim: int | None
    qkv_bias: bool
    proj_dropout: float
    local: LocalKind | None
    gate: bool

    @property
    def layers(self) -> dict[str, Any]:
        """The options of the layers around the kernel, arguments of :class:`Attention`."""
        return {"proj_dropout": self.proj_dropout, "local": self.local, "gate": self.gate}


def attention_options(
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    proj_dropout: float = 0.0,
    local: LocalKind | None = None,
    gate: bool = False,
) -> AttentionOptions:
    """The options of attention, whatever its kernel.

    Args:
        head_dim: width K per head; dim / heads by default.
        qkv_bias: whether the projection to queries, keys and values adds a bias.
        proj_dropout: dropout after the output projection.
        local: depth-wise convolution of the values over the grid, added to the output of the
            kernel: "dwc3" (3 x 3), "dwc5" (5 x 5, shared by all heads), "lepe" (5 x 5) or None.
        gate: whether the output of the kernel is multiplied by silu(x W + b).
    """
    return AttentionOptions(head_dim, qkv_bias, proj_dropout, local, gate)


def check_mixer(
    name: str, dim: int, heads: int | None, grid: TokenGrid, options: Mapping[str, Any]
) -> None:
    """Raise a ValueError for an unknown name or option, or heads that do not fit the mixer."""
    check_options(f"mixer {name!r}", options, mixer_options(name))
    if not isinstance(grid, TokenGrid) or not isinstance(grid.shape, tuple | list):
        raise ValueError(f"grid {grid!r} must be a TokenGrid of sizes, such as TokenGrid((32, 32))")
    check_types({"dim": dim, "heads": heads}, create_mixer)
    check_at_least("dim", dim, 1)
    if takes_heads(name):
        if heads is None:
            raise ValueError(f"mixer {name!r} needs heads: give heads=")
    elif heads is not None:
        raise ValueError(f"mixer {name!r} has no heads: leave heads={heads} out")


def create_kernel(
    name: str,
    dim: int,
    heads: int | None,
    queries: TokenGrid,
    keys: TokenGrid,
    options: Mapping[str, Any],
    value_ratio: int = 1,
) -> tuple[Kernel, AttentionOptions]:
    """Build the kernel of an attention, and return the attention's own options next to it.

    Args:
        name: name of the kernel.
        dim: token width D, from which the width of a head follows.
        heads: number of heads.
        queries: positions of the queries.
        keys: positions of keys and values.
        options: of the attention and the kernel.
        value_ratio: value width per head for a key width of 1.

    Raises:
        ValueError: for an option of the wrong type or value.
    """
    own = options_of(attention_options)
    rest = {k: v for k, v in options.items() if k in own}
    check_types(rest, attention_options)
    attention = attention_options(**rest)
    heads, key_dim = head_width(dim, heads, attention.head_dim)
    site = Site(heads, key_dim, value_ratio * key_dim, queries, keys)
    kernel_options = {k: v for k, v in options.items() if k not in own}
    return KERNELS.create(name, site, options=kernel_options), attention


def create_mixer(
    name: str,
    *,
    dim: int,
    heads: int | None = None,
    grid: TokenGrid,
    **options: Any,
) -> Mixer:
    """Build a single layer: a module ``mixer(x, grid)``, (B, N, D) -> (B, N, D).

    Attention is wired as in ViT: linear layers to queries, keys and values, and an output layer.

    Args:
        name: one of :func:`list_mixers`.
        dim: token width D.
        heads: number of heads, for mixers that have heads.
        grid: positions of the N tokens.
        options: of that mixer, see :func:`mixer_options`.

    Raises:
        ValueError: for an unknown name or option (with the nearest), or an invalid value.
    """
    check_mixer(name, dim, heads, grid, options)
    grid = TokenGrid(tuple(grid.shape), grid.prefix)
    if name not in KERNELS:
        return MIXERS.create(name, dim, heads, grid, options=options)
    kernel, own = create_kernel(name, dim, heads, grid, grid, options)
    widths = kernel.operand_widths
    # Linformer shortens the tokens before the layers to keys and values, so these are separate.
    split = isinstance(kernel, Linformer)
    projection: Projection = (SplitProjection if split else LinearProjection)(
        dim, grid, widths, own.qkv_bias
    )
    proj = nn.Linear(kernel.site.heads * kernel.site.value_dim, dim)
    return Attention(projection, kernel, proj, **own.layers)
