"""What a block can hold. A kernel's name stands for attention with that kernel."""

from __future__ import annotations

import fnmatch
import inspect
from typing import Any

from ..kernels import KERNELS
from ..layout import Layout
from ..registry import (
    check_at_least,
    check_options,
    check_types,
    import_all,
    options_of,
    unknown,
)
from .attention import Attention
from .base import MIXERS, Mixer
from .slots import ClassSlot, ConvSlot, NormSlot, Slot
from .windows import WindowSlot

__all__ = [
    "MIXERS",
    "Attention",
    "ClassSlot",
    "ConvSlot",
    "Mixer",
    "NormSlot",
    "Slot",
    "WindowSlot",
    "create_mixer",
    "list_mixers",
    "mixer_options",
    "takes_bias",
    "takes_heads",
    "takes_rope",
]


import_all(__name__, __path__)

VIT_SLOT = Slot()


def list_mixers(pattern: str = "*") -> list[str]:
    """Names for :func:`create_mixer` that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter({*KERNELS.names(), *MIXERS.names()}, pattern))


def mixer_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a mixer, with defaults and types, by name."""
    if name in KERNELS:
        return options_of(Attention) | options_of(KERNELS[name])
    return options_of(_mixer(name))


def _mixer(name: str) -> type[Mixer]:
    """The class of a mixer that is no kernel; an unknown name is told all of both."""
    if name not in MIXERS:
        raise unknown("mixer", name, list_mixers())
    return MIXERS[name]


def takes_heads(name: str) -> bool:
    """Whether the mixer has heads."""
    return name in KERNELS or _mixer(name).takes_heads


def takes_rope(name: str) -> bool:
    """Whether the mixer has queries and keys that can be rotated."""
    return KERNELS[name].takes_rope if name in KERNELS else _mixer(name).takes_rope


def takes_bias(name: str) -> bool:
    """Whether the mixer has an attention map to which a position bias can be added."""
    return name in KERNELS and KERNELS[name].takes_bias


def create_mixer(
    name: str,
    *,
    dim: int,
    heads: int | None = None,
    layout: Layout,
    slot: Slot = VIT_SLOT,
    **options: Any,
) -> Mixer:
    """One layer alone: a module ``mixer(x, layout)``, (B, N, D) -> (B, N, D).

    Args:
        name: one of :func:`list_mixers`.
        dim: token width D.
        heads: number of heads, for mixers that have heads.
        layout: where the N tokens lie.
        slot: how a backbone wires it: :class:`Slot` (ViT), :class:`ConvSlot` (CvT),
            :class:`NormSlot` (LeViT), which may change the grid and the width,
            :class:`ClassSlot` (CaiT) or :class:`WindowSlot` (Swin, CrossFormer).
        options: of that mixer, see :func:`mixer_options`.

    Raises:
        ValueError: for an unknown name or option (with the nearest) or a value that does not fit.
    """
    known = mixer_options(name)
    check_options(f"mixer {name!r}", options, known)
    if not isinstance(layout, Layout):
        raise ValueError(f"layout {layout!r} must be a Layout, such as Layout((32, 32))")
    check_types({"dim": dim, "heads": heads, "slot": slot}, create_mixer)
    check_at_least("dim", dim, 1)
    layout = Layout(tuple(layout.grid), layout.prefix)
    if takes_heads(name):
        if heads is None:
            raise ValueError(f"mixer {name!r} needs heads: give heads=")
    elif heads is not None:
        raise ValueError(f"mixer {name!r} has no heads: leave heads={heads} out")
    if name in KERNELS:
        own = options_of(KERNELS[name])
        kernel_options = {k: v for k, v in options.items() if k in own}
        rest = {k: v for k, v in options.items() if k not in own}
        check_types(rest, Attention.__init__)
        return Attention(dim, heads, layout, name, kernel_options, slot, **rest)
    return slot.adapt(MIXERS.create(name, dim, heads, layout, options=options))
