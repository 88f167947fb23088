"""The largest batch that fits into a memory, for a model with each mixer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import torch

import vision_xformer as vx

from .cases import Case, mixer_of
from .rows import Row

MIB = 2**20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_STATE_BYTES = 16  # of a parameter: weight, gradient and AdamW's two moments, in float32
HEADINGS = ("mixer", "model, MiB", "each image, MiB", "largest batch")
_BATCHES = 2, 4  # not 1: batch norm of one value has no training


def parse_memory(text: str) -> int:
    """Bytes of "16GB", "16 GiB", "800M"; units are powers of 1024, as cards are sold."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"--memory {text} must be a number with a unit, such as 16GB")
    return int(float(found[1]) * _UNITS[found[2]])


def cases_of(name: str, size: int, dtype: str) -> list[Case]:
    """A model with its own and every other mixer, at two batches each.

    A ValueError says why the model itself cannot be of that size.
    """
    with torch.device("meta"):
        vx.create_model(name, image_size=size)
    own = mixer_of(name)
    others = [mixer for mixer in vx.list_mixers() if mixer != own] if own else []
    model = Case("model", name, size, 1, dtype)
    return [
        dataclasses.replace(model, batch=batch, mixer=mixer)
        for mixer in ("", *others)
        for batch in _BATCHES
    ]


def plan(
    cases: list[Case], memory: int, measure: Callable[[Case], Row]
) -> Iterator[tuple[str, str, str, str]]:
    """A line of ``HEADINGS`` for each mixer, as it becomes known. A step is measured at two
    batches; the rest is a straight line.

    An image takes what the peak grows by, and no less than what is kept for backward: where the
    gradients are most of a small batch's peak, that does not grow. To it come weights, gradients
    and AdamW's moments; what CUDA itself holds (some 0.5 GiB) does not.
    """
    for one, two in zip(cases[::2], cases[1::2], strict=True):
        first = measure(one)
        second = measure(two) if first["status"] == "ok" else first
        mixer = one.mixer or "its own"
        status = second["status"]
        if status == "ok" and "peak_mib" not in first:
            raise ValueError("this system does not say how much memory a process holds")
        if status != "ok":
            here = "more than this machine has" if status == "out of memory" else status
            yield mixer, "", "", here
            continue
        more = two.batch - one.batch
        each = max((second[c] - first[c]) / more for c in ("peak_mib", "kept_mib"))
        fixed = first["parameters"] * _STATE_BYTES / MIB
        batch = int((memory / MIB - fixed) // each)
        fits = f"{batch:,}" if batch >= 1 else "does not fit"
        yield mixer, f"{fixed:,.0f}", f"{each:,.1f}", fits
