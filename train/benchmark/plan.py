"""Estimate of the largest batch size that fits into memory, for a model with each mixer."""

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
_STATE_BYTES = 16  # per parameter: weight, gradient and the two moments of AdamW, in float32
HEADINGS = ("mixer", "model, MiB", "each image, MiB", "largest batch")
_BATCHES = 2, 4  # not 1: batch norm cannot train on a single value


def parse_memory(text: str) -> int:
    """Parse a memory size such as "16GB", "16 GiB" or "800M".

    Units are powers of 1024, as vendors of accelerators use them.

    Returns:
        The size in bytes.

    Raises:
        ValueError: if the text is not a positive number with a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"--memory {text} must be a number with a unit, such as 16GB")
    return int(float(found[1]) * _UNITS[found[2]])


def cases_of(name: str, size: int, dtype: str) -> list[Case]:
    """List the cases to measure: the model with each mixer, at two batch sizes.

    Args:
        name: model name.
        size: image size in pixels.
        dtype: "fp32", "bf16" or "fp16".

    Returns:
        Two cases per mixer, starting with the model's own mixer.

    Raises:
        ValueError: if the model is unknown or does not support the image size.
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
    """Estimate the largest batch size for each mixer, by linear extrapolation.

    The memory per image is the growth of the peak between the two batch sizes, but at least the
    memory saved for backward: with a small batch, gradients may dominate a peak that then hardly
    grows. Weights, gradients and the moments of AdamW are added; the CUDA context (about 0.5 GiB)
    is not.

    Args:
        cases: pairs of cases that differ in batch size only.
        memory: memory of the device, in bytes.
        measure: function that measures a case.

    Yields:
        A line with the columns ``HEADINGS`` for each mixer. The last column states the reason if
        the mixer could not be measured; the others are then empty.

    Raises:
        ValueError: if the system does not report the memory of a process.
    """
    for one, two in zip(cases[::2], cases[1::2], strict=True):
        first = measure(one)
        second = measure(two) if first["status"] == "ok" else first
        mixer = one.mixer or "its own"
        status = second["status"]
        if status == "ok" and "peak_mib" not in first:
            raise ValueError("this system does not report the peak memory of a process")
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
