"""Fit tensors to the shapes of a module: reshape, split, interpolate, adapt channels."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..positions import FixedTable, resize_grid
from .grouping import Part

_LENGTH_PROJECTION = re.compile(r"(^|\.)kernel\.proj_[kv]$")
_SPECTRUM = re.compile(r"(^|\.)filter\.grid$")
_POSITION_BIAS = re.compile(r"(^|\.)position_bias$")
_FIRST_LAYER = re.compile(
    r"(branches\.\d+\.)?stem\.(proj\.|convs\.\d+\.(conv\.)?)?weight|stages\.0\.downsample\.conv\.weight"
)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.ndim > 1 else tensor


def is_table(parts: list[Part]) -> bool:
    """Whether these are the parts of a table that stores the shape of its grid."""
    return parts[-1].key.endswith(".grid")


def fit(source: list[Part], target: list[Part]) -> list[Tensor] | None:
    """Split the source into the parts and shapes of the target; None if it does not fit."""
    tables = is_table(source) and is_table(target)
    if tables and source[-1].tensor.shape != target[-1].tensor.shape:
        return None  # grids (4, 8) and (8, 4) have equally many rows, but other positions
    if not (is_table(source) or is_table(target)) and len(source) == len(target) == 1:
        shape = target[0].tensor.shape
        squeezed = source[0].tensor.squeeze().shape == target[0].tensor.squeeze().shape
        return [source[0].tensor.reshape(shape)] if squeezed else None
    rows = torch.cat([_rows(p.tensor) for p in source])
    wanted = [_rows(p.tensor).shape for p in target]
    if rows.shape[1:] != wanted[0][1:] or rows.shape[0] != sum(w[0] for w in wanted):
        return None
    cut = rows.split([w[0] for w in wanted])
    return [c.reshape(p.tensor.shape) for c, p in zip(cut, target, strict=True)]


def is_computed(module: nn.Module, name: str, source: list[Part]) -> bool:
    """Whether the tensor is a table that the module computes instead of saving it."""
    table = dict(module.named_modules()).get(name)
    if not isinstance(table, FixedTable):
        return False
    theirs, ours = _rows(source[0].tensor), table()
    if not theirs.is_floating_point():
        return False
    # both tables are rounded, and so are the arguments of their sines
    rounding = max(torch.finfo(t.dtype).eps for t in (theirs, ours))
    atol = rounding + len(theirs) * torch.finfo(torch.float32).eps
    return theirs.shape == ours.shape and torch.allclose(
        theirs.cpu().double(), ours.cpu().double(), rtol=0, atol=atol
    )


def resize_table(
    module: nn.Module, name: str, source: list[Part], target: list[Part]
) -> list[Tensor] | None:
    """Interpolate a table along its grid and keep prefix rows; None if that is impossible."""
    if not is_table(target):
        return None
    grid = tuple(target[-1].tensor.shape[:-1])
    prefix = target[0].tensor.shape[0] if len(target) == 2 else 0
    if is_table(source):
        old = source[-1].tensor
        old_prefix = source[0].tensor if len(source) == 2 else old.new_empty(0, old.shape[-1])
    else:
        rows = _rows(source[0].tensor)
        old_grid = guess_grid(rows.shape[0] - prefix, grid)
        if old_grid is None:
            return None
        old_prefix, old = rows[:prefix], rows[prefix:].view(*old_grid, -1)
    if old_prefix.shape[0] != prefix or old.shape[-1] != target[-1].tensor.shape[-1]:
        return None
    if old.ndim - 1 != len(grid):
        return None
    if _POSITION_BIAS.search(name):
        return [_resize_distances(old, grid)]
    if _SPECTRUM.search(name):
        owner: Any = module.get_submodule(target[-1].key.rpartition(".")[0])
        return [_resize_spectrum(old, owner.shape)]
    new = resize_grid(old, grid)
    if _LENGTH_PROJECTION.search(name):  # weights of a sum over tokens: keep the sum
        new = new * (math.prod(old.shape[:-1]) / math.prod(grid))
    return [old_prefix, new] if prefix else [new]


def _resize_distances(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Interpolate a table over distances 0, 1, ... on each axis, mirrored to negative ones."""
    for axis in range(len(grid)):
        table = torch.cat((table.narrow(axis, 1, table.shape[axis] - 1).flip(axis), table), axis)
    both = resize_grid(table, tuple(2 * g - 1 for g in grid))
    return both[tuple(slice(g - 1, None) for g in grid)]


def _resize_spectrum(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Transform the filter of a transfer function, unchanged, at the frequencies of another grid.

    Cells of the filter that are outside the other grid wrap around, as its convolution does.

    Shape: (*half of the old grid, 2 D) -> (*half of the grid, 2 D), real parts next to imaginary
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    axes = tuple(range(len(grid)))
    whole = _whole(table.shape[:-1], grid)
    taps = torch.fft.irfftn(torch.complex(*wide.chunk(2, -1)), whole, axes)
    for axis, (old, new) in enumerate(zip(whole, grid, strict=True)):
        offsets = (torch.arange(old, device=table.device) + old // 2) % old - old // 2
        shape = (*taps.shape[:axis], new, *taps.shape[axis + 1 :])
        taps = taps.new_zeros(shape).index_add(axis, offsets % new, taps)
    spectrum = torch.fft.rfftn(taps, dim=axes)
    return torch.cat((spectrum.real, spectrum.imag), -1).to(table.dtype)


def _whole(half: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """Guess the grid of a table of half of its frequencies, n // 2 + 1 on the last axis.

    Of the two possible n, it is the one of the same aspect ratio as the other grid, else that of a
    square, else the even one.
    """
    *others, last = half
    possible = [n for n in (2 * (last - 1), 2 * last - 1) if n > 0]
    if others:
        for side in (others[-1] * like[-1] / like[-2], others[-1]):
            if side in possible:
                return (*others, int(side))
    return (*others, possible[0])


def guess_grid(cells: int, like: tuple[int, ...]) -> tuple[int, ...] | None:
    """Guess the grid of a table of ``cells`` rows: same aspect ratio as the target, else square."""
    if cells < 1:
        return None
    for shape in (like, (1,) * len(like)):
        scale = (cells / math.prod(shape)) ** (1 / len(shape))
        grid = tuple(round(s * scale) for s in shape)
        if math.prod(grid) == cells:
            return grid
    return None


def adapt(module: nn.Module, name: str, source: list[Part], target: list[Part]) -> Tensor | None:
    """Adapt the weights of a first layer to another number of channels, as timm does.

    For a single channel, they are summed over the channels; for more, they are repeated and scaled
    by the ratio of the old to the new number of channels.

    Returns:
        The weights, or None if this is not a first layer or the shapes differ otherwise.
    """
    config = getattr(module, "config", None)
    if config is None or not _FIRST_LAYER.fullmatch(name) or len(source) != 1:
        return None
    old, new = source[0].tensor, target[0].tensor
    # the second axis of a linear patch embedding is (pixel, channel)
    patch = module.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    pixels = math.prod(getattr(patch, "patch_size", ())) if new.ndim == 2 else 1
    if old.ndim != new.ndim or old.shape[1] % pixels or new.shape[1] % pixels:
        return None
    weight = old.unflatten(1, (pixels, -1)).movedim(2, 0)  # (C, D, pixels, ...)
    channels, before = new.shape[1] // pixels, len(weight)
    if channels != config.input_shape[0]:  # a deeper convolution
        return None
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == 1:
        weight = weight.sum(0, keepdim=True)
    else:
        repeated = weight.repeat(-(-channels // before), *(1,) * (weight.ndim - 1))
        weight = repeated[:channels] * (before / channels)
    weight = weight.movedim(0, 2).flatten(1, 2).to(old.dtype)
    return weight if weight.shape == new.shape else None
