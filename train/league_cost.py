"""Time and memory of the models of the league: ``python -m train.league_cost --out FILE``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import vision_xformer as vx

from .benchmark.rows import Row, machine, write_csv
from .league import ENTRIES, TOKENS, command
from .measure import step_seconds
from .model import Sizes, build_model
from .recipes import parse

COLUMNS = ("mixer", "tokens", "ms", "mib")
METHOD = (
    "models of python -m train.league with a batch of {batch} images of 32 x 32 pixels, in float32",
    "ms: median time of a forward and a backward pass over {rounds} rounds; the models take turns",
    "mib: peak memory of a training step with AdamW, computed from shapes without measuring",
)
_BATCH, _ROUNDS, _MIB = 8, 15, 2**20


def measure(tokens: int, mixers: Sequence[str] = tuple(ENTRIES)) -> list[Row]:
    """Measure the models with a number of tokens.

    Args:
        tokens: number of tokens, one of :data:`train.league.TOKENS`.
        mixers: names of mixers.

    Returns:
        A row with ``COLUMNS`` for each mixer.
    """
    models = {}
    for mixer in mixers:
        config = parse(command(Path("run"), mixer, tokens, 0, "images")[1:])
        models[mixer] = build_model(config.model, Sizes(32, 3, 10))
    images = torch.randn(_BATCH, 3, 32, 32)
    seconds = step_seconds(models, images, contextlib.nullcontext(), _ROUNDS)
    return [
        {
            "mixer": mixer,
            "tokens": tokens,
            "ms": 1e3 * seconds[mixer],
            "mib": vx.memory(model, tuple(images.shape), device="cpu").peak / _MIB,
        }
        for mixer, model in models.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """The program; ``arguments`` are those of the command line by default."""
    parser = argparse.ArgumentParser(prog="python -m train.league_cost", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    out = parser.parse_args(arguments).out
    rows = [row for tokens in tqdm(TOKENS, unit="length") for row in measure(tokens)]
    method = [line.format(batch=_BATCH, rounds=_ROUNDS) for line in METHOD]
    call = f"command: python -m train.league_cost --out {out.name}"
    write_csv(out, [*machine("cpu"), *method, call], COLUMNS, rows)


if __name__ == "__main__":
    main()
