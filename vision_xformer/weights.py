"""Weights in and out: safetensors files, and state dicts of other packages under their own names.

Every known spelling of a parameter is brought to one, ours; a spelling that splits one of ours in
parts (to_q, to_k, to_v) names the part. Source and target are read alike, so weights move in both
directions between our modules and those of the packages.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbones import Backbone
from .layers import resize_grid
from .zoo import create_model

# (pattern, our spelling), applied in this order
_SPELLINGS = [
    (r"^((module|_orig_mod)\.)+", ""),  # of data parallel and torch.compile
    (r"\._orig_mod\.", "."),
    # vision_xformer 0.1.8 to 0.2.0: ViN, ViP, ViL, FNet
    (r"^pos_embedding$", "position"),
    (r"^to_patch_embedding\.1\.", "stem.norm_in."),
    (r"^to_patch_embedding\.2\.", "stem.proj."),
    (r"^to_patch_embedding\.3\.", "stem.norm_out."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.0\.norm\.", r"blocks.\2.norm1."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.", r"blocks.\1.mixer."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.1\.norm\.", r"blocks.\2.norm2."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\2.mlp.fc1."),
    (r"^(transformer|token_mixer)\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\2.mlp.fc2."),
    (r"^mlp_head\.0\.", "norm."),
    (r"^mlp_head\.1\.", "head."),
    # its FNet2D
    (r"^conv\.(\d)\.", r"stem.convs.\1."),
    (r"^layers\.(\d+)\.ff\.0\.", r"blocks.\1.norm."),
    (r"^layers\.(\d+)\.ff\.1\.net\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ff\.1\.net\.3\.", r"blocks.\1.mlp.fc2."),
    (r"^pool\.2\.", "head."),
    # the norm after pooling is the norm
    (r"^fc_norm\.", "norm."),
    # performer-pytorch, nystrom-attention, linformer: alone, in our slot, in a published model
    (r"(^|\.)module\.", r"\1"),
    (r"(^|\.)to_qkv\.", r"\1projection.qkv."),
    (r"(^|\.)to_out\.(0\.)?", r"\1proj."),
    (r"(^|\.)res_conv\.weight$", r"\1kernel.residual"),
    (r"(^|\.)fast_attention\.", r"\1kernel."),
    (r"(^|mixer\.)(proj_[kv])$", r"\1kernel.\2"),
]
# (pattern, our spelling, which part of it this is)
_PARTS = [
    (r"(^|\.)to_q\.", r"\1projection.qkv.", 0),
    (r"(^|\.)to_k\.", r"\1projection.qkv.", 1),
    (r"(^|\.)to_v\.", r"\1projection.qkv.", 2),
    (r"^(position|(?:.*\.)?kernel\.proj_[kv])\.prefix$", r"\1", 0),
    (r"^(position|(?:.*\.)?kernel\.proj_[kv])\.grid$", r"\1", 1),
]
_LENGTH_PROJECTION = re.compile(r"(^|\.)kernel\.proj_[kv]$")


class _Part(NamedTuple):
    order: int
    key: str
    tensor: Tensor


class LoadReport(NamedTuple):
    """What :func:`load_weights` did: the source's keys it used as they are, and resized."""

    used: list[str]
    resized: list[str]


def _by_our_name(state: Mapping[str, Tensor]) -> dict[str, list[_Part]]:
    """Group tensors by our spelling of their names; parts in order."""
    groups: dict[str, list[_Part]] = {}
    for key, tensor in state.items():
        name, order = key, 0
        for pattern, ours in _SPELLINGS:
            name = re.sub(pattern, ours, name)
        for pattern, ours, part in _PARTS:
            name, found = re.subn(pattern, ours, name)
            order = part if found else order
        groups.setdefault(name, []).append(_Part(order, key, tensor))
    return {name: sorted(parts) for name, parts in groups.items()}


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor


def _shapes(parts: list[_Part]) -> str:
    return " + ".join(str(tuple(p.tensor.shape)) for p in parts)


def _is_table(parts: list[_Part]) -> bool:
    return parts[-1].key.endswith(".grid")


def _fit(source: list[_Part], target: list[_Part]) -> list[Tensor] | None:
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


def _resize(name: str, source: list[_Part], target: list[_Part]) -> list[Tensor] | None:
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
    new = resize_grid(old, grid)
    if _LENGTH_PROJECTION.search(name):  # weights of a sum over tokens: keep the sum
        new = new * (math.prod(old.shape[:-1]) / math.prod(grid))
    return [old_prefix, new] if prefix else [new]


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


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    resize: bool = False,
) -> LoadReport:
    """Load weights into a model or mixer, whole or not at all.

    Understood names: ours; those of vision_xformer 0.1.8 to 0.2.0 (ViN, ViP, ViL, FNet, FNet2D);
    those of performer-pytorch, nystrom-attention and linformer. ``module`` may be one of theirs.

    Args:
        module: what to load into.
        weights: a state dict, or a file of one (.safetensors, or a PyTorch file of tensors only).
        resize: interpolate tables that have a row for each token (positions, Linformer's length
            projections) to the module's grid: bicubic on images; prefix rows are kept.

    Returns:
        Which keys were used as they are and which resized.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape; it names the keys, and
            nothing is loaded.
    """
    where = ""
    if not isinstance(weights, Mapping):
        where = f" from {os.fspath(weights)}"
        weights = read_weights(weights)
    source, target = _by_our_name(weights), _by_our_name(module.state_dict())
    report = LoadReport([], [])
    problems: list[str] = []
    loaded: list[tuple[Tensor, Tensor]] = []
    missing = [p.key for name in target.keys() - source.keys() for p in target[name]]
    extra = [p.key for name in source.keys() - target.keys() for p in source[name]]
    for what, keys in (("missing", missing), ("not in the module", extra)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            problems.append(f"{what}: {', '.join(sorted(keys)[:5])}{more}")
    for name in target.keys() & source.keys():
        new, kind = _fit(source[name], target[name]), report.used
        if new is None and resize:
            new, kind = _resize(name, source[name], target[name]), report.resized
        keys = [p.key for p in source[name]]
        if new is None:
            hint = "" if resize or not _is_table(target[name]) else ", resize=True interpolates it"
            problems.append(
                f"{' + '.join(keys)} of shape {_shapes(source[name])} does not fit "
                f"{_shapes(target[name])}{hint}"
            )
        else:
            kind += keys
            loaded += [(p.tensor, t) for p, t in zip(target[name], new, strict=True)]
    if problems:
        kind_of = type(module).__name__
        raise ValueError(f"weights{where} are not those of this {kind_of}: {'; '.join(problems)}")
    with torch.no_grad():
        for tensor, value in loaded:
            tensor.copy_(value)
    return LoadReport(sorted(report.used), sorted(report.resized))


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
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and what torch raises for it
        raise ValueError(f"{path} is not a file of tensors only: {type(error).__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        keys = f"; its keys are {sorted(map(str, state))[:5]}" if isinstance(state, dict) else ""
        raise ValueError(f"{path} is not a state dict, name -> tensor{keys}")
    return state


def save_model(model: Backbone, path: str | os.PathLike[str]) -> None:
    """Write weights and configuration to one safetensors file, whole or not at all."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    metadata = {"config": json.dumps(model.config.to_dict())}
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(state, part, metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_model(path: str | os.PathLike[str]) -> Backbone:
    """Rebuild a model from :func:`save_model`'s file, in evaluation mode on the CPU."""
    state = read_weights(path)
    metadata = None
    if Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    if not metadata or "config" not in metadata:
        raise ValueError(f"{path} has no model configuration: was it written by save_model?")
    try:
        model = create_model(json.loads(metadata["config"]))
        # in the type it was saved in
        model.to(next(t.dtype for t in state.values() if t.is_floating_point()))
        load_weights(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.eval()
