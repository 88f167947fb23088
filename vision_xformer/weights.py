"""Weights in: state dicts and files, ours, of the attention packages and of other libraries."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .layers import resize_grid
from .positions import FixedTable
from .spellings import Part, by_our_name, family_of

_LENGTH_PROJECTION = re.compile(r"(^|\.)kernel\.proj_[kv]$")
_POSITION_BIAS = re.compile(r"(^|\.)position_bias$")


class LoadReport(NamedTuple):
    """What :func:`load_weights` did with the source's keys and the module's.

    Attributes:
        used: keys of the source that were used as they are.
        resized: those whose table was interpolated.
        unused: those that were left out, of another shape or not in the module.
        missing: keys of the module that stay as they were.
    """

    used: list[str]
    resized: list[str]
    unused: list[str]
    missing: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensor{'s' * (len(self.used) != 1)} used"]
        for what, keys in (
            ("resized", self.resized),
            ("left out", self.unused),
            ("of the module's not given", self.missing),
        ):
            parts += [f"{len(keys)} {what}: {_some(keys)}"] if keys else []
        return "; ".join(parts)


def _some(keys: list[str]) -> str:
    """The first of them, sorted."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{', '.join(sorted(keys)[:5])}{more}"


def _check_state(weights: object) -> None:
    """Raise a ValueError for what is not a dict of names and tensors that can be copied."""
    if not isinstance(weights, Mapping):
        kind = type(weights).__name__
        raise ValueError(f"weights must be a state dict or the path of a file, not {kind}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"weights must be tensors by name; {key!r} is of type {kind}")
        if value.is_meta or value.layout != torch.strided or value.is_complex():
            raise ValueError(f"weights must be dense, real and in memory; {key!r} is not")


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor


def _shapes(parts: list[Part]) -> str:
    return " + ".join(str(tuple(p.tensor.shape)) for p in parts)


def _is_table(parts: list[Part]) -> bool:
    return parts[-1].key.endswith(".grid")


def _fit(source: list[Part], target: list[Part]) -> list[Tensor] | None:
    """The source cut to the target's parts and shapes; None where it does not fit."""
    tables = _is_table(source) and _is_table(target)
    if tables and source[-1].tensor.shape != target[-1].tensor.shape:
        return None  # (4, 8) and (8, 4) have as many rows, but not the same places
    if not (_is_table(source) or _is_table(target)) and len(source) == len(target) == 1:
        shape = target[0].tensor.shape
        squeezed = source[0].tensor.squeeze().shape == target[0].tensor.squeeze().shape
        return [source[0].tensor.reshape(shape)] if squeezed else None
    rows = torch.cat([_rows(p.tensor) for p in source])
    wanted = [_rows(p.tensor).shape for p in target]
    if rows.shape[1:] != wanted[0][1:] or rows.shape[0] != sum(w[0] for w in wanted):
        return None
    cut = rows.split([w[0] for w in wanted])
    return [c.reshape(p.tensor.shape) for c, p in zip(cut, target, strict=True)]


def _is_computed(module: nn.Module, name: str, source: list[Part]) -> bool:
    """Whether the tensor is a table that the module does not save but computes."""
    table = dict(module.named_modules()).get(name)
    if not isinstance(table, FixedTable):
        return False
    theirs, ours = _rows(source[0].tensor), table()
    if not theirs.is_floating_point():
        return False
    # both are rounded, and so is each place before its sine
    rounding = max(torch.finfo(t.dtype).eps for t in (theirs, ours))
    atol = rounding + len(theirs) * torch.finfo(torch.float32).eps
    return theirs.shape == ours.shape and torch.allclose(
        theirs.to(ours.device, torch.float64), ours.double(), rtol=0, atol=atol
    )


def _resize(name: str, source: list[Part], target: list[Part]) -> list[Tensor] | None:
    """Tables interpolated along the grid, prefix rows kept; None where that cannot be."""
    if not _is_table(target):
        return None
    grid = tuple(target[-1].tensor.shape[:-1])
    prefix = target[0].tensor.shape[0] if len(target) == 2 else 0
    if _is_table(source):
        old = source[-1].tensor
        old_prefix = source[0].tensor if len(source) == 2 else old.new_empty(0, old.shape[-1])
    else:
        rows = _rows(source[0].tensor)
        old_grid = _guess_grid(rows.shape[0] - prefix, grid)
        if old_grid is None:
            return None
        old_prefix, old = rows[:prefix], rows[prefix:].view(*old_grid, -1)
    if old_prefix.shape[0] != prefix or old.shape[-1] != target[-1].tensor.shape[-1]:
        return None
    if old.ndim - 1 != len(grid):
        return None
    if _POSITION_BIAS.search(name):
        return [_resize_distances(old, grid)]
    new = resize_grid(old, grid)
    if _LENGTH_PROJECTION.search(name):  # weights of a sum over tokens: keep the sum
        new = new * (math.prod(old.shape[:-1]) / math.prod(grid))
    return [old_prefix, new] if prefix else [new]


def _resize_distances(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A table over distances 0, 1, ... on each axis, interpolated as one over both directions."""
    for axis in range(len(grid)):
        table = torch.cat((table.narrow(axis, 1, table.shape[axis] - 1).flip(axis), table), axis)
    both = resize_grid(table, tuple(2 * g - 1 for g in grid))
    return both[tuple(slice(g - 1, None) for g in grid)]


def _guess_grid(cells: int, like: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of a table that does not say: of the target's proportions, or else square."""
    if cells < 1:
        return None
    for shape in (like, (1,) * len(like)):
        scale = (cells / math.prod(shape)) ** (1 / len(shape))
        grid = tuple(round(s * scale) for s in shape)
        if math.prod(grid) == cells:
            return grid
    return None


def _match(
    module: nn.Module,
    source: Mapping[str, list[Part]],
    target: Mapping[str, list[Part]],
    resize: bool,
) -> tuple[LoadReport, list[str], list[tuple[Tensor, Tensor]]]:
    """The report, what stands against a strict load, and pairs of (to be filled, by what)."""
    report = LoadReport([], [], [], [])
    extra: list[str] = []
    missing: list[str] = []
    misfits: list[str] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in source.keys() | target.keys():
        theirs, ours = source.get(name, []), target.get(name, [])
        keys, own_keys = [p.key for p in theirs], [p.key for p in ours]
        if not theirs:
            missing += own_keys
            continue
        if not ours:
            (report.used if _is_computed(module, name, theirs) else extra).extend(keys)
            continue
        new, kind = _fit(theirs, ours), report.used
        if new is None and resize:
            new, kind = _resize(name, theirs, ours), report.resized
        if new is None:
            hint = "" if resize or not _is_table(ours) else ", resize=True interpolates it"
            both = f"{_shapes(theirs)} does not fit {_shapes(ours)}"
            misfits.append(f"{' + '.join(keys)} of shape {both}{hint}")
            report.unused.extend(keys)
            report.missing.extend(own_keys)
        else:
            kind += keys
            pairs += [(p.tensor, t) for p, t in zip(ours, new, strict=True)]
    report.unused.extend(extra)
    report.missing.extend(missing)
    for keys in report:
        keys.sort()
    kinds = {"missing": missing, "not in the module": extra}
    problems = [f"{what}: {_some(keys)}" for what, keys in kinds.items() if keys] + misfits
    return report, problems, pairs


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    resize: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Load weights into a model or mixer, whole or not at all.

    Understood names: ours; those of vision_xformer 0.1.8 to 0.2.0 (ViN, ViP, ViL, FNet, FNet2D);
    those of performer-pytorch, nystrom-attention and linformer, whose modules may also be filled;
    timm's ViT, LeViT, CaiT, CrossViT, Swin, ConvMixer, MLP-Mixer and gMLP, transformers' CvT, and
    the Compact-Transformers of the CCT authors.

    Args:
        module: what to load into.
        weights: a state dict, or a file of one (.safetensors, or a PyTorch file of tensors only).
        resize: interpolate tables that have a row for each token (positions, Linformer's length
            projections) or distance (LeViT's bias) to the module's grid: bicubic on images; prefix
            rows are kept. A table of another library does not say its grid: as many rows are taken
            as of the module's, others as of its proportions, or else as square.
        strict: refuse weights that are not all of the module's and no others. Otherwise what fits
            is loaded, and the report says what does not.

    Returns:
        Which keys were used, resized, left out and not given.

    Raises:
        ValueError: with ``strict``, if a tensor is missing, left over or of another shape; it names
            the keys. Without, if nothing fits. Nothing is loaded then.
    """
    where = ""
    if isinstance(weights, str | os.PathLike):
        where = f" from {os.fspath(weights)}"
        weights = read_weights(weights)
    _check_state(weights)
    own = module.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"this {type(module).__name__} is on the meta device: call to_empty(device=...) first"
        )
    library = family_of(own)
    if library is not None:
        raise ValueError(f"load_weights does not fill modules of {library.library}")
    report, problems, loaded = _match(module, by_our_name(weights), by_our_name(own), resize)
    if (strict and problems) or not loaded:
        raise ValueError(
            f"weights{where} are not those of this {type(module).__name__}: {'; '.join(problems)}"
        )
    with torch.no_grad():
        for tensor, value in loaded:
            tensor.copy_(value)
    return report


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file; one that is torn or holds anything but tensors is a ValueError."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        kind = type(error).__name__
        raise ValueError(f"{path} cannot be read as weights: {kind} {error}") from error
    except Exception as error:  # pickle.UnpicklingError and what torch raises for it
        raise ValueError(f"{path} is not a file of tensors only: {type(error).__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        keys = f"; its keys are {sorted(map(str, state))[:5]}" if isinstance(state, dict) else ""
        raise ValueError(f"{path} is not a state dict, name -> tensor{keys}")
    return state
