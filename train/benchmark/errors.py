"""Error of Performer and Nyströmformer against exact attention, by number of features or landmarks.

Queries and keys are random fields on a 32 x 32 grid or come from the attention of a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

import vision_xformer as vx
from vision_xformer.kernels.base import KERNELS
from vision_xformer.kernels.softmax import Softmax, SoftmaxEager

from ..augment import plain
from ..config import RunConfig
from ..data import load_data
from ..html import Section, Table
from ..pixels import pixels_of
from ..plots import STYLE, log_scale
from .rows import Row

COLUMNS = ("input", "kernel", "size", "error", "largest")
METHOD = (
    "error: |approximate - exact| / |exact| of the attention output (Frobenius norms, float64)",
    "mean and maximum over draws, heads and images; Nyströmformer without its convolution",
    "smooth: Gaussian noise, low-pass filtered to 4 periods per side, scaled to the given std",
)
SIZES = (16, 64, 256)
# label, kernel, option that is varied, other options
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
    """Draw unit-variance noise with at most four periods per side, (draws, heads, N, K)."""
    noise = torch.randn(
        _DRAWS, _HEADS, _HEAD_DIM, _SIDE, _SIDE, generator=generator, dtype=torch.float64
    )
    waves = torch.fft.fftfreq(_SIDE, 1 / _SIDE).abs()
    low = (waves[:, None] <= 4) & (waves <= 4)
    field: Tensor = torch.fft.ifft2(torch.fft.fft2(noise) * low).real
    return (field / field.std()).flatten(-2).mT


def fields() -> Iterator[tuple[str, Operands]]:
    """Draw smooth fields at three scales, and white noise, which landmarks cannot represent.

    Yields:
        The name of an input; and its queries, keys (draws, heads, N, K), values (draws, heads, N,
        V) and grid.
    """
    generator = torch.Generator().manual_seed(0)
    grid = vx.TokenGrid((_SIDE, _SIDE))
    for scale in (0.5, 1.0, 2.0):
        q, k, v = (smooth_field(generator) for _ in range(3))
        yield f"smooth fields, {scale:g}", (scale * q, scale * k, v, grid)
    shape = _DRAWS, _HEADS, _SIDE * _SIDE, _HEAD_DIM
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    yield "noise, 1", (q, k, v, grid)


def trained(folder: Path, config: RunConfig) -> Iterator[tuple[str, Operands]]:
    """Record the inputs of each softmax attention of a trained model, on test images.

    Attention with a position bias (LeViT), which the approximations do not support, is skipped, and
    so is attention whose queries and keys lie on different grids (CvT).

    Args:
        folder: folder of the training run.
        config: configuration of the run.

    Yields:
        The name of an attention layer; and its queries, keys (B, H, N, K), values (B, H, N, V) and
        grid.

    Raises:
        ValueError: if the model has no suitable attention.
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
        model(plain(batch, pixels_of(model)).double())
    if not found:
        raise ValueError(
            f"--run {folder}: {config.model.name} has no softmax attention without position bias "
            "whose queries and keys lie on the same grid"
        )
    for index, operands in enumerate(found, start=1):
        yield f"{folder.name}, attention {index}", operands


@torch.no_grad()
def error_of(line: tuple[str, str, str, dict[str, Any]], size: int, given: Operands) -> Tensor:
    """Compute the relative errors of a kernel.

    Args:
        line: label, kernel, option that is varied, and other options.
        size: number of landmarks or features.
        given: queries, keys (B, H, N, K), values (B, H, N, V) and their grid.

    Returns:
        Relative errors (B, H).
    """
    _, name, option, options = line
    q, k, v, grid = given
    torch.manual_seed(0)  # Performer draws its features
    site = vx.Site(q.shape[1], q.shape[-1], v.shape[-1], grid, grid)
    kernel = KERNELS.create(name, site, options={option: size, **options})
    exact = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    away = kernel.double()(q, k, v, grid, grid) - exact
    return away.flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


def measure_errors(inputs: Sequence[tuple[str, Operands]], bar: Any) -> list[Row]:
    """Measure a row for each input, kernel and size with fewer landmarks than tokens."""
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
    """Plot the error against the number of landmarks or features, one panel per input."""
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
            log_scale(axis.xaxis, SIZES)
            log_scale(axis.yaxis)
            axis.set_title(name, loc="left", fontsize=12)
            axis.grid(axis="y", color="#eaeef2")
        for row in axes:
            row[0].set_ylabel("mean relative error")
        for axis in axes[-1]:
            axis.set_xlabel("number of landmarks or features")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(labels), frameon=False, loc="upper left")
        figure.tight_layout(rect=(0, 0, 1, 0.93 if lines == 1 else 0.96))
    return figure


def error_section(comments: Sequence[str], rows: Sequence[Row]) -> Section:
    """Build the figure and the table of a file of errors.

    Args:
        comments: comment lines of the file.
        rows: rows of the file, as text.

    Raises:
        ValueError: if the rows are not errors.
    """
    try:
        if any(not 0 < float(r["error"]) < math.inf or int(r["size"]) not in SIZES for r in rows):
            raise ValueError("an error or a size is out of range")
        at = {(r["input"], r["kernel"], int(r["size"])): float(r["error"]) for r in rows}
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a file of errors: {error}") from error
    names = dict.fromkeys((r["input"], r["kernel"]) for r in rows)
    body = [
        [f"{given}: {kernel}"]
        + [f"{at[given, kernel, s]:.3f}" if (given, kernel, s) in at else "" for s in SIZES]
        for given, kernel in names
    ]
    table = Table(["landmarks or features", *map(str, SIZES)], body, "mean relative error")
    return Section("Errors against exact attention", picture(rows), [table], comments)
