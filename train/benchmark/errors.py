"""How far Performer and Nystromformer are from exact attention, as features and landmarks grow.

On fields of queries and keys over a 32 x 32 grid, and on those of a trained model's own attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

import vision_xformer as vx
from vision_xformer.kernels.base import KERNELS
from vision_xformer.kernels.softmax import Softmax, SoftmaxEager

from ..augment import plain
from ..config import RunConfig
from ..data import load_data
from ..html import Section, Table
from ..plots import STYLE
from .rows import Row

COLUMNS = ("input", "kernel", "size", "error", "largest")
METHOD = (
    "error: |approximate - exact| / |exact| of what attention returns (Frobenius norms, float64)",
    "mean and largest over draws, heads and images; Nystromformer without its convolution",
    "smooth: normal noise, its waves of up to 4 periods a side kept, at a standard deviation",
)
SIZES = (16, 64, 256)
# line, kernel, its option that grows, and the rest
_LINES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("nystrom, grid", "nystrom", "landmarks", {"segments": "grid", "residual_kernel": 0}),
    ("nystrom, sequence", "nystrom", "landmarks", {"segments": "sequence", "residual_kernel": 0}),
    ("performer", "performer", "features", {"stabilizer": "exponent"}),
    ("performer, package", "performer", "features", {"stabilizer": "package"}),
)
_STYLES = {"nystrom, grid": ("#1f6feb", "-"), "nystrom, sequence": ("#1f6feb", "--"),
           "performer": ("#bf8700", "-"), "performer, package": ("#bf8700", "--")}  # fmt: skip
_SIDE, _HEADS, _HEAD_DIM, _DRAWS, _IMAGES = 32, 4, 32, 2, 4

Operands = tuple[Tensor, Tensor, Tensor, vx.TokenGrid]


def smooth_field(generator: torch.Generator) -> Tensor:
    """(draws, heads, N, K) of unit variance, without waves of more than four periods a side."""
    noise = torch.randn(
        _DRAWS, _HEADS, _HEAD_DIM, _SIDE, _SIDE, generator=generator, dtype=torch.float64
    )
    waves = torch.fft.fftfreq(_SIDE, 1 / _SIDE).abs()
    low = (waves[:, None] <= 4) & (waves <= 4)
    field: Tensor = torch.fft.ifft2(torch.fft.fft2(noise) * low).real
    return (field / field.std()).flatten(-2).mT


def fields() -> Iterator[tuple[str, Operands]]:
    """Smooth fields at three scales, and noise, where no landmark can stand for its segment."""
    generator = torch.Generator().manual_seed(0)
    grid = vx.TokenGrid((_SIDE, _SIDE))
    for scale in (0.5, 1.0, 2.0):
        q, k, v = (smooth_field(generator) for _ in range(3))
        yield f"smooth fields, {scale:g}", (scale * q, scale * k, v, grid)
    shape = _DRAWS, _HEADS, _SIDE * _SIDE, _HEAD_DIM
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    yield "noise, 1", (q, k, v, grid)


def trained(folder: Path, config: RunConfig) -> Iterator[tuple[str, Operands]]:
    """What each softmax attention of a run's model computes with, on test images.

    Those with a position bias (LeViT), which no approximation can have, and those whose keys lie on
    another grid (CvT) are left out; a ValueError where none is left.
    """
    model = vx.load_model(folder / "best.safetensors").double().eval()
    found: list[Operands] = []

    def look(kernel: Any, inputs: tuple[Any, ...]) -> None:
        q, k, v, queries, keys, *bias = inputs
        if queries == keys and bias in ([], [None]):
            found.append((q, k, v, queries))

    for part in model.modules():
        if isinstance(part, (Softmax, SoftmaxEager)):
            part.register_forward_pre_hook(look)
    images = load_data(config.data, torch.device("cpu")).test
    batch = torch.stack([images[i][0] for i in range(min(_IMAGES, len(images)))])
    with torch.no_grad():
        model(plain(batch).double())
    if not found:
        raise ValueError(
            f"--run {folder}: {config.model.name} has no softmax attention without position bias "
            "whose queries and keys lie on one grid"
        )
    for index, operands in enumerate(found, start=1):
        yield f"{folder.name}, attention {index}", operands


@torch.no_grad()
def error_of(line: tuple[str, str, str, dict[str, Any]], size: int, given: Operands) -> Tensor:
    """(B, H) relative errors of a kernel with that many landmarks or features."""
    _, name, option, options = line
    q, k, v, grid = given
    torch.manual_seed(0)  # Performer draws its features
    site = vx.Site(q.shape[1], q.shape[-1], v.shape[-1], grid, grid)
    kernel = KERNELS.create(name, site, options={option: size, **options})
    exact = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    away = kernel.double()(q, k, v, grid, grid) - exact
    return away.flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


def measure_errors(inputs: Sequence[tuple[str, Operands]], bar: Any) -> list[Row]:
    """A row for each input, kernel and size; more landmarks than tokens are left out."""
    rows = []
    for name, given in inputs:
        for line in _LINES:
            for size in SIZES:
                bar.update()
                if line[2] == "landmarks" and size >= given[0].shape[-2]:
                    continue
                errors = error_of(line, size, given)
                rows.append(
                    {"input": name, "kernel": line[0], "size": size,
                     "error": errors.mean().item(), "largest": errors.max().item()}
                )  # fmt: skip
    return rows


def picture(rows: Sequence[Row]) -> Figure:
    """A panel for each input: error against landmarks or features."""
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    columns = min(4, len(inputs))
    lines = -(-len(inputs) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, 3.6 * lines + 0.6))
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axis in axes.flat[len(inputs) :]:
            axis.remove()
        for axis, name in zip(axes.flat, inputs, strict=False):
            for kernel, (color, style) in _STYLES.items():
                points = [
                    (int(r["size"]), float(r["error"]))
                    for r in rows
                    if (r["input"], r["kernel"]) == (name, kernel)
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), color=color, linestyle=style,
                              marker="o", markersize=5, label=kernel)  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(SIZES, [str(size) for size in SIZES])
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.set_title(name, loc="left", fontsize=12)
            axis.grid(axis="y", color="#eaeef2")
        for row in axes:
            row[0].set_ylabel("relative error")
        for axis in axes[-1]:
            axis.set_xlabel("landmarks or features")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(labels), frameon=False, loc="upper left")
        figure.tight_layout(rect=(0, 0, 1, 0.93 if lines == 1 else 0.96))
    return figure


def error_section(comments: Sequence[str], rows: Sequence[Row]) -> Section:
    """Picture and table of a file's rows; a ValueError where they are none."""
    try:
        if any(not 0 < float(r["error"]) < math.inf or int(r["size"]) not in SIZES for r in rows):
            raise ValueError("a figure that cannot be")
        at = {(r["input"], r["kernel"], int(r["size"])): float(r["error"]) for r in rows}
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a file of errors: {error}") from error
    names = dict.fromkeys((r["input"], r["kernel"]) for r in rows)
    body = [
        [f"{given}: {kernel}"]
        + [f"{at[given, kernel, s]:.3f}" if (given, kernel, s) in at else "" for s in SIZES]
        for given, kernel in names
    ]
    table = Table(["landmarks or features", *map(str, SIZES)], body, "relative error, mean")
    return Section("Errors against exact attention", picture(rows), [table], comments)
