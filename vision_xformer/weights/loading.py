"""Match state dicts and files to modules, resize tables, and report what was loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..positions import FixedTable, resize_grid
from .conversion import Part, group_by_name, library_of

_LENGTH_PROJECTION = re.compile(r"(^|\.)kernel\.proj_[kv]$")
_POSITION_BIAS = re.compile(r"(^|\.)position_bias$")


class LoadReport(NamedTuple):
    """What :func:`load_weights` did with the keys of the source and of the module.

    Attributes:
        used: keys of the source that were used unchanged.
        resized: keys of the source whose table was interpolated.
        unused: keys of the source that were left out, of another shape or not in the module.
        missing: keys of the module that were left unchanged.
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
            ("missing from the weights", self.missing),
        ):
            parts += [f"{len(keys)} {what}: {_first_keys(keys)}"] if keys else []
        return "; ".join(parts)


def _first_keys(keys: list[str]) -> str:
    """The first five, sorted."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{', '.join(sorted(keys)[:5])}{more}"


def _check_state(weights: object) -> None:
    """Raise a ValueError for anything but a dict of names and tensors that can be copied."""
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
    """The source split into the parts and shapes of the target; None if it does not fit."""
    tables = _is_table(source) and _is_table(target)
    if tables and source[-1].tensor.shape != target[-1].tensor.shape:
        return None  # (4, 8) and (8, 4) have as many rows, but other positions
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
    """Whether the tensor is a table that the module computes instead of saving it."""
    table = dict(module.named_modules()).get(name)
    if not isinstance(table, FixedTable):
        return False
    theirs, ours = _rows(source[0].tensor), table()
    if not theirs.is_floating_point():
        return False
    # both are rounded, and so is each position before its sine
    rounding = max(torch.finfo(t.dtype).eps for t in (theirs, ours))
    atol = rounding + len(theirs) * torch.finfo(torch.float32).eps
    return theirs.shape == ours.shape and torch.allclose(
        theirs.cpu().double(), ours.cpu().double(), rtol=0, atol=atol
    )


def _resize(name: str, source: list[Part], target: list[Part]) -> list[Tensor] | None:
    """Tables interpolated along the grid, with prefix rows kept; None if that is impossible."""
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
    """Interpolate a table over distances 0, 1, ... on each axis as one over both directions."""
    for axis in range(len(grid)):
        table = torch.cat((table.narrow(axis, 1, table.shape[axis] - 1).flip(axis), table), axis)
    both = resize_grid(table, tuple(2 * g - 1 for g in grid))
    return both[tuple(slice(g - 1, None) for g in grid)]


def _guess_grid(cells: int, like: tuple[int, ...]) -> tuple[int, ...] | None:
    """Guess the grid of a table of ``cells`` rows: same aspect ratio as the target, else square."""
    if cells < 1:
        return None
    for shape in (like, (1,) * len(like)):
        scale = (cells / math.prod(shape)) ** (1 / len(shape))
        grid = tuple(round(s * scale) for s in shape)
        if math.prod(grid) == cells:
            return grid
    return None


class _Match(NamedTuple):
    """The parts of one parameter in the source and in the module, and how they go together.

    ``values`` are the new values of the target's parts if the kind is "used" or "resized".
    """

    kind: Literal["used", "resized", "unexpected", "missing", "misfit"]
    source: list[Part]
    target: list[Part]
    values: list[Tensor]

    @property
    def misfit(self) -> str:
        keys = " + ".join(part.key for part in self.source)
        return f"{keys} of shape {_shapes(self.source)} does not fit {_shapes(self.target)}"


def _match(
    module: nn.Module, name: str, source: list[Part], target: list[Part], resize: bool
) -> _Match:
    if not source:
        return _Match("missing", source, target, [])
    if not target:
        known = _is_computed(module, name, source)
        return _Match("used" if known else "unexpected", source, target, [])
    values = _fit(source, target)
    if values is not None:
        return _Match("used", source, target, values)
    resized = _resize(name, source, target) if resize else None
    if resized is not None:
        return _Match("resized", source, target, resized)
    return _Match("misfit", source, target, [])


def _report(matches: list[_Match]) -> LoadReport:
    def keys(side: Literal["source", "target"], *kinds: str) -> list[str]:
        return sorted(p.key for m in matches if m.kind in kinds for p in getattr(m, side))

    return LoadReport(
        used=keys("source", "used"),
        resized=keys("source", "resized"),
        unused=keys("source", "unexpected", "misfit"),
        missing=keys("target", "missing", "misfit"),
    )


def _problems(matches: list[_Match], resize: bool) -> list[str]:
    """The reasons why a strict load fails, as text."""
    missing = [p.key for m in matches if m.kind == "missing" for p in m.target]
    unexpected = [p.key for m in matches if m.kind == "unexpected" for p in m.source]
    kinds = {"missing": missing, "not in the module": unexpected}
    problems = [f"{what}: {_first_keys(keys)}" for what, keys in kinds.items() if keys]
    for match in matches:
        if match.kind == "misfit":
            tables = _is_table(match.target) and not resize
            problems.append(match.misfit + (", resize=True interpolates it" if tables else ""))
    return problems


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    resize: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Load weights into a model or mixer; on an error the module is left unchanged.

    Understood keys: ours; those of vision_xformer 0.1.8 to 0.2.0 (ViN, ViP, ViL, FNet, FNet2D);
    those of performer-pytorch, nystrom-attention and linformer, whose modules can be loaded, too;
    timm's ViT, LeViT, CaiT, CrossViT, Swin, PVT v2, ConvMixer, MLP-Mixer and gMLP, transformers'
    CvT, and the Compact-Transformers of the CCT authors.

    Args:
        module: the module to load into.
        weights: a state dict, or a file of one (.safetensors, or a PyTorch file of tensors only).
        resize: interpolate tables that have a row for each token (positions, the projections of
            Linformer) or distance (the bias of LeViT) to the grid of the module: bicubic on images;
            prefix rows are kept. A table of another library does not store its grid, so it is
            guessed: same number of rows, else same aspect ratio, else square.
        strict: require exactly the tensors of the module. Otherwise those that fit are loaded, and
            the report lists the others.

    Returns:
        The keys that were used, resized, unused and missing.

    Raises:
        ValueError: with ``strict``, if a tensor is missing, unexpected or of another shape; it
            names the keys. Without, if nothing fits. The module is left untouched.
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
    library = library_of(own)
    if library is not None:
        raise ValueError(f"load_weights does not fill modules of {library.name}")
    source, target = group_by_name(weights), group_by_name(own)
    matches = [
        _match(module, name, source.get(name, []), target.get(name, []), resize)
        for name in sorted(source.keys() | target.keys())
    ]
    problems = _problems(matches, resize)
    if (strict and problems) or not any(match.values for match in matches):
        raise ValueError(
            f"weights{where} are not those of this {type(module).__name__}: {'; '.join(problems)}"
        )
    with torch.no_grad():
        for match in matches:
            if match.values:
                for part, value in zip(match.target, match.values, strict=True):
                    part.tensor.copy_(value)
    return _report(matches)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a file.

    Raises:
        ValueError: for a file that is missing, truncated, or contains anything but tensors.
    """
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
