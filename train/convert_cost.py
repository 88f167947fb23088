"""Time and memory of a converted model, before and after, against the number of tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from vision_xformer.memory_use import MIB, bytes_kept

from .config import ConvertConfig, RunConfig
from .devices import pick_device, pick_precision
from .measure import step_seconds
from .model import Sizes, build_model

TEACHER = "softmax"  # the model before conversion
_BATCH, _ROUNDS = 8, 5
_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Cost = dict[str, Any]  # name, tokens, ms of a training step, MiB kept for backward


def image_sizes(image_size: int, tokens_now: int, tokens: Sequence[int]) -> list[int]:
    """Image sizes at which a model has other numbers of tokens.

    Args:
        image_size: of the model, in pixels.
        tokens_now: number of patches at that size.
        tokens: numbers of patches, squares.

    Raises:
        ValueError: for a number that is not a square or needs a fraction of a pixel.
    """
    found = []
    for count in tokens:
        side, rest = divmod(math.isqrt(count) * image_size, math.isqrt(tokens_now))
        if rest or math.isqrt(count) ** 2 != count:
            raise ValueError(f"--tokens {count} must be the square of a number of patches")
        found.append(side)
    return found


def measure_cost(
    config: RunConfig, mixers: Mapping[str, ConvertConfig], sizes: Mapping[int, int], data: Sizes
) -> list[Cost]:
    """Measure training steps of a batch of eight images; the models take turns.

    Args:
        config: of the model before conversion.
        mixers: conversions by name.
        sizes: image size in pixels for each number of tokens.
        data: channels and classes.
    """
    device = torch.device(pick_device(config.train.device))
    dtype = _DTYPES[pick_precision(config.train.precision, device.type)]
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    every = {TEACHER: ConvertConfig(), **mixers}
    rows = []
    for tokens, size in tqdm(sizes.items(), desc="cost", unit="size", disable=None):
        given = data._replace(image_size=size)
        models = {
            name: build_model(dataclasses.replace(config.model, convert=conversion), given)
            for name, conversion in every.items()
        }
        images = torch.randn(_BATCH, data.channels, size, size, device=device)
        seconds = step_seconds(models, images, autocast, _ROUNDS)
        for name, model in models.items():
            with autocast:
                kept = bytes_kept(model, partial(model, images))
            ms = 1e3 * seconds[name]
            rows.append({"name": name, "tokens": tokens, "ms": ms, "mib": kept / MIB})
    return rows
