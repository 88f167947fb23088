"""Suggest the configuration of a ViT that reproduces the model of the given weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .conversion import FC_NORM
from .fitting import guess_grid, is_table
from .grouping import Part, unwrap

Groups = Mapping[str, list[Part]]


def norm_is_elsewhere(source: list[Part], target: list[Part]) -> bool:
    """Whether one of two norms comes before the pool and the other after it."""
    keys = unwrap(source[0].key), unwrap(target[0].key)
    is_norm = all(key.startswith(("norm.", "fc_norm.")) for key in keys)
    return is_norm and len({bool(re.match(FC_NORM, key)) for key in keys}) == 2


def other_fields(module: nn.Module, source: Groups, target: Groups) -> dict[str, Any]:
    """Return the fields that a ViT should have for these weights, where they differ from its own.

    They are derived from the prefix tokens, LayerScale, the number of positions and the position of
    the norm.
    For models other than a ViT, the result is empty.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "no_embed_class") or "blocks.0.norm1.weight" not in source:
        return {}
    found: dict[str, Any] = {}
    class_token = "cls_token" in source
    registers = source["reg_token"][0].tensor.shape[1] if "reg_token" in source else 0
    pool, norm = config.pool, "norm.weight"
    if norm in source and norm in target and norm_is_elsewhere(source[norm], target[norm]):
        wanted = not config.has_fc_norm  # a norm after the pool implies a mean
        pool = "mean" if wanted else "cls" if class_token else pool
        if pool != config.pool:
            found["pool"] = pool
        if config.fc_norm is not None or wanted != (pool == "mean"):
            found["fc_norm"] = wanted
    if class_token != config.has_class_token or (class_token and pool == "mean" != config.pool):
        found["class_token"] = class_token
    if registers != config.registers:
        found["registers"] = registers
    if ("blocks.0.scale1.gamma" in source) != (config.layer_scale is not None):
        found["layer_scale"] = 1e-5 if config.layer_scale is None else None
    no_embed = _no_embed_class(class_token + registers, source, target, config.no_embed_class)
    if no_embed != config.no_embed_class:
        found["no_embed_class"] = no_embed
    return found


def _no_embed_class(tokens: int, source: Groups, target: Groups, ours: bool) -> bool:
    """Whether the position table of the source has no rows for its class and register tokens.

    A table of another library is judged by its number of rows, with or without the tokens: that of
    the module's grid, otherwise of a grid with the same aspect ratio, otherwise of a square one.
    """
    if not tokens or "position" not in source or "position" not in target:
        return ours
    parts, like = source["position"], tuple(target["position"][-1].tensor.shape[:-1])
    if is_table(parts):
        return ours if len(parts) == len(target["position"]) else not ours
    rows = parts[0].tensor.shape[-2]
    for matches in (lambda cells: cells == math.prod(like), lambda cells: guess_grid(cells, like)):
        possible = {no: bool(matches(rows - (0 if no else tokens))) for no in (ours, not ours)}
        if any(possible.values()):
            return next(no for no, fits in possible.items() if fits)
    return ours


def as_sentence(fields: Mapping[str, Any]) -> str:
    """Return a sentence that says which fields to set, or "" for none."""
    if not fields:
        return ""
    return "build the model with " + ", ".join(f"{k}={v!r}" for k, v in fields.items())
