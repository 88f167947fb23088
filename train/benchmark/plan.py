"""The largest batch size that fits into memory, for a model with each mixer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

import vision_xformer as vx
from vision_xformer.memory_use import MIB

from ..cli import Parser
from ..commands import output_file
from ..config import ModelConfig
from ..html import Table
from ..model import Sizes, build_base, timm_name
from .cases import CLASSES, DTYPES, Case, mixer_of
from .rows import Row, check_replaced, machine, write_csv

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_STATE_BYTES = 16  # per parameter: weight, gradient and the two moments of AdamW, in float32
HEADINGS = ("mixer", "model, MiB", "each image, MiB", "largest batch")
_BATCHES = 2, 4  # not 1: batch norm cannot train on a single value


@dataclasses.dataclass(frozen=True)
class Planned:
    """A model whose memory is computed.

    Attributes:
        name: of the model, or "timm:NAME".
        mixer: "" for its own.
        size: of the images, in pixels.
        options: of :func:`vision_xformer.memory`.
        checkpointing: whether activations of the blocks are recomputed in the backward pass.
    """

    name: str
    mixer: str
    size: int
    options: dict[str, Any]
    checkpointing: bool = False

    @property
    def label(self) -> str:
        """Name and mixer."""
        return ", ".join(filter(None, (self.name, self.mixer)))

    def build(self) -> torch.nn.Module:
        """Build the model without data.

        Raises:
            ValueError: if model, mixer and image size do not fit together.
        """
        with torch.device("meta"):
            model: Any = build_base(
                ModelConfig(self.name, self.mixer or None), Sizes(self.size, 3, CLASSES)
            )
        if self.checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise ValueError(f"--checkpointing: {self.name} has no set_grad_checkpointing")
            model.set_grad_checkpointing()
        return model


def models_of(patterns: list[str]) -> list[tuple[str, str]]:
    """Names and mixers: of one name with every mixer, of a pattern all models that match it.

    Raises:
        ValueError: for an unknown model of timm, or a pattern that matches no model.
    """
    found: list[tuple[str, str]] = []
    for pattern in patterns:
        if pattern.startswith("timm:"):
            timm_name(pattern)
            found.append((pattern, ""))
            continue
        names = vx.list_models(pattern)
        if not names:
            raise ValueError(f"--name {pattern}: no model matches")
        own = mixer_of(names[0])
        every = ["", *(mixer for mixer in vx.list_mixers() if own and mixer != own)]
        found += [
            (name, mixer) for name in names for mixer in (every if names == [pattern] else [""])
        ]
    return list(dict.fromkeys(found))


def largest_batch(planned: Planned, memories: list[int]) -> tuple[vx.Memory, float, list[int]]:
    """Search the largest batch sizes that fit into memories of some sizes, in bytes.

    The memory is nearly linear in the batch size: an estimate from two batch sizes is corrected
    until that batch fits and one more image does not.

    Returns:
        The memory of the smaller of the two, the bytes of each image, and the largest batch sizes,
        0 where not even one image fits.

    Raises:
        ValueError: if model, mixer and image size do not fit together.
    """
    model = planned.build()
    known: dict[int, vx.Memory] = {}

    def peak(batch: int) -> int:
        if batch not in known:
            shape = (batch, 3, planned.size, planned.size)
            known[batch] = vx.memory(model, shape, **planned.options)
        return known[batch].peak

    one, two = _BATCHES
    each = max(1.0, (peak(two) - peak(one)) / (two - one))

    def largest(memory: int) -> int:
        batch = one + int((memory - peak(one)) // each)
        if batch <= two:
            return max(batch, 0)
        slope = (peak(batch) - peak(one)) / (batch - one)
        while (step := int((memory - peak(batch)) // slope)) not in (0, -1):
            batch += step
        while peak(batch) > memory:
            batch -= 1
        while peak(batch + 1) <= memory:
            batch += 1
        return batch

    return known[one], each, [largest(memory) for memory in memories]


_KEYS = ("name", "mixer", "size", "status")


def _figures(planned: Planned, memories: dict[str, int], batch: int) -> Row:
    """Compute the columns of a row: the largest batch in each memory, or the parts for one batch.

    Raises:
        ValueError: if model, mixer and image size do not fit together.
    """
    if memories:
        first, each, found = largest_batch(planned, list(memories.values()))
        held = first.weights + first.gradients + first.optimizer + first.average
        batches = {f"batch in {text}": n for text, n in zip(memories, found, strict=True)}
        return {"model_mib": held / MIB, "image_mib": each / MIB, **batches}
    shape = (batch, 3, planned.size, planned.size)
    memory = vx.memory(planned.build(), shape, **planned.options)
    parts = ("weights", "gradients", "optimizer", "kept", "peak")
    found_mib = {f"{part}_mib": getattr(memory, part) / MIB for part in parts}
    return {**found_mib, "peak in": memory.peak_module}


def _columns(rows: list[Row]) -> list[str]:
    """The columns of figures, in order."""
    return [name for name in dict.fromkeys(n for row in rows for n in row) if name not in _KEYS]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return value if isinstance(value, str) else f"{value:,}" if value else "does not fit"


def add_options(parser: Parser) -> None:
    """Add the options of the command ``plan``."""
    add = parser.add_argument
    add(
        "--name", "--model", nargs="+", required=True, metavar="NAME",
        help="a model, which is planned with every mixer; a pattern for list_models; or timm:NAME",
    )  # fmt: skip
    add("--image-size", nargs="+", type=PositiveInt, default=[32], metavar="PIXELS",
        help="height and width of the images")  # fmt: skip
    add("--memory", nargs="+", default=[], metavar="SIZE",
        help="memory of devices, such as 16GB, to find the largest batch sizes for")  # fmt: skip
    add("--batch", type=PositiveInt, default=8, help="batch size, without --memory")
    add("--precision", choices=DTYPES, default="fp32",
        help="precision; bf16 and fp16 use autocast")  # fmt: skip
    add("--optimizer", choices=("adamw", "sgd", "muon", "none"), default="adamw",
        help="optimizer, whose state is counted")  # fmt: skip
    add("--checkpointing", action="store_true",
        help="recompute activations in the backward pass")  # fmt: skip
    add("--accumulate", action="store_true", help="count gradients of earlier batches")
    add("--average", action="store_true",
        help="count an exponential moving average of the weights")  # fmt: skip
    add("--inference", action="store_true", help="inference instead of a training step")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="device, whose operators differ")
    add("--out", type=Path, help="CSV file of the results")
    add("--measure", action="store_true",
        help="measure training steps with batches of 2 and 4 on this machine instead")  # fmt: skip


def computed(args: Namespace) -> str:
    """Tabulate the memory of models, or how large a batch fits.

    Raises:
        ValueError: for an invalid memory size, a pattern that matches no model, or sizes that none
            of the models takes.
    """
    options = {
        "precision": args.precision, "optimizer": args.optimizer, "training": not args.inference,
        "average": args.average, "accumulate": args.accumulate, "device": args.device,
    }  # fmt: skip
    memories = {text: parse_memory(text) for text in args.memory}
    planned = [
        Planned(name, mixer, size, options, args.checkpointing)
        for name, mixer in models_of(args.name)
        for size in args.image_size
    ]
    if args.out is not None:
        check_replaced(output_file(args.out), _KEYS, "computed memory")
    kind = "inference" if args.inference else f"a training step with {args.optimizer}"
    more = [name for name in ("checkpointing", "accumulate", "average") if args[name]]
    what = ", ".join([f"memory of {kind}", args.precision, *more, f"computed for {args.device}"])
    rows: list[Row] = []
    with tqdm(planned, unit="model", disable=None) as bar:
        for one in bar:
            bar.set_postfix_str(f"{one.label}, {one.size}")
            row: Row = {"name": one.name, "mixer": one.mixer, "size": one.size, "status": "ok"}
            try:
                rows.append(row | _figures(one, memories, args.batch))
            except ValueError as error:
                rows.append(row | {"status": str(error)})
            if args.out is not None:
                write_csv(args.out, [*machine(), what], [*_KEYS, *_columns(rows)], rows)
    if all(row["status"] != "ok" for row in rows):
        raise ValueError(rows[0]["status"])
    numbers = _columns(rows)
    table = Table(
        ("model", "pixels", *(n.replace("_mib", ", MiB").replace("_", " ") for n in numbers)),
        [[one.label, f"{one.size:,}", *(_cell(row[n]) for n in numbers)]
         for one, row in zip(planned, rows, strict=True) if row["status"] == "ok"],
    )  # fmt: skip
    failed = [(p, r["status"]) for p, r in zip(planned, rows, strict=True) if r["status"] != "ok"]
    return "\n".join([table.text(), *(f"{p.label} at {p.size:,}: {why}" for p, why in failed)])


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
    grows. Weights, gradients and the moments of AdamW are added; the CUDA context (about 1 GiB)
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
