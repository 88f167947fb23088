"""Time and memory of the models of the league, see :mod:`train.league`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

import vision_xformer as vx
from vision_xformer.memory_use import MIB

from ..league import ENTRIES, TOKENS, recipe
from ..measure import step_seconds
from ..model import Sizes, build_model
from ..recipes import parse
from .rows import Row

BATCH, ROUNDS = 8, 15
COLUMNS = ("mixer", "tokens", "ms", "mib")
METHOD = (
    f"models of python -m train.league; a batch of {BATCH} images of 32 x 32 pixels, float32",
    f"ms: median time of a forward and a backward pass over {ROUNDS} rounds; the models take turns",
    "mib: peak memory of a training step with AdamW, computed from shapes without measuring",
)


def measure_league(
    mixers: Sequence[str] = tuple(ENTRIES), lengths: Sequence[int] = tuple(TOKENS)
) -> Iterator[Row]:
    """Yield a row for each mixer and number of tokens, measured on the CPU.

    Args:
        mixers: names of mixers.
        lengths: numbers of tokens, of :data:`train.league.TOKENS`.
    """
    images = torch.randn(BATCH, 3, 32, 32)
    for tokens in lengths:
        models = {
            mixer: build_model(parse(recipe(mixer, tokens)).model, Sizes(32, 3, 10))
            for mixer in mixers
        }
        seconds = step_seconds(models, images, contextlib.nullcontext(), ROUNDS)
        for mixer, model in models.items():
            ms = 1e3 * seconds[mixer]
            peak = vx.memory(model, tuple(images.shape), device="cpu").peak
            yield {"mixer": mixer, "tokens": tokens, "ms": ms, "mib": peak / MIB}
