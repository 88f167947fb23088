"""Figures of memory and time by sequence length, with exponents and crossovers; bars of models."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ..html import Table
from ..plots import BLUE, STYLE, log_scale, save
from ..provenance import fingerprint
from .cases import BASE, EAGER, PAIRS, mixer_of
from .controls import CONTROLS
from .rows import Row, label, number, read_rows

Points = list[tuple[int, float]]
FROM = 1024  # smallest length that exponents are fitted to
_COLORS = {
    "softmax": "#1f2328", "softmax_eager": "#9aa5b1", "linformer": "#2da44e",
    "performer": "#bf8700", "nystrom": "#1f6feb", "fourier": "#cf222e",
}  # fmt: skip
_MORE = (  # for all other mixers
    "#8250df", "#0a7d8c", "#d4498e", "#6e4c1e", "#7ab8f5", "#9bd08f", "#e8a87c", "#b08fd8",
)  # fmt: skip
HEADLINE = {
    "softmax": "softmax (fused)", "linformer": "Linformer", "performer": "Performer",
    "nystrom": "Nyströmformer", "fourier": "Fourier",
}  # fmt: skip
_PRECISION = {"fp32": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
PEERS = {peer: ours for ours, (peer, *_) in PAIRS.items()}


def series(rows: Sequence[Row], column: str) -> dict[str, Points]:
    """Collect the (size, value) points of each mixer or model, sorted by size.

    Out of memory counts as infinity; unknown values are left out.
    """
    found: dict[str, Points] = {}
    for row in rows:
        value = math.inf if row["status"] == "out of memory" else row.get(column)
        if value:
            found.setdefault(label(row), []).append((row["size"], float(value)))
    return {name: sorted(points) for name, points in found.items()}


def colors(names: Iterable[str]) -> dict[str, str]:
    """Choose a color for each mixer, and for each model that of its mixer if no other has it.

    Packages get that of our mixer.
    """
    names, found = list(names), {}
    more, taken = itertools.cycle(_MORE), set()
    for name in dict.fromkeys(PEERS.get(name, name) for name in names):
        color = _COLORS.get(_mixer(name))
        if color is None or color in taken:
            color = "#c9d1d9" if name in CONTROLS else next(more)
        taken.add(color)
        found[name] = color
    return {name: found[PEERS.get(name, name)] for name in names}


def _mixer(name: str) -> str:
    """The mixer of a model, ``MODEL`` or ``MODEL, MIXER``, or of ``MIXER:OPTIONS``."""
    model, _, mixer = name.partition(", ")
    if mixer:
        return mixer
    try:
        return mixer_of(model)
    except ValueError:
        return model.partition(":")[0]


def exponent(points: Points) -> float | None:
    """Fit the exponent of a power law to the sizes from ``FROM`` on, by least squares.

    Returns:
        The exponent, or None if there are fewer than two finite values.
    """
    logs = [(math.log(n), math.log(y)) for n, y in points if n >= FROM and y < math.inf]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def crossing(points: Points, base: Points) -> float | None:
    """Find the size from which on values stay below a baseline, interpolated on log-log axes.

    Args:
        points: (size, value) pairs, sorted by size; out of memory is infinity.
        base: the same for the baseline.

    Returns:
        The crossover; the smallest common size if the values are always below, infinity if they
        are not below at the largest size, and None if there is nothing to compare.
    """
    other = dict(base)
    shared = [(n, y, other[n]) for n, y in points if n in other]
    ratios = [(n, 0.0 if math.isinf(z) else y / z) for n, y, z in shared if min(y, z) < math.inf]
    if not ratios:
        return None
    if ratios[-1][1] >= 1:
        return math.inf
    last = max((i for i, (_, ratio) in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return ratios[0][0]
    (n0, r0), (n1, r1) = ratios[last : last + 2]
    if math.isinf(r0) or r1 == 0:
        return n1
    return n0 * math.exp(math.log(n1 / n0) * math.log(r0) / math.log(r0 / r1))


def lengths(rows: Sequence[Row], panels: Sequence[tuple[str, str]], title: str) -> Figure:
    """Plot columns against size, one panel per column and one line per mixer or model.

    Packages are dashed, controls dotted. A dotted vertical line marks the size from which on a
    mixer stays below fused softmax. The identity is omitted, since its tiny values would compress
    the scale of all others.

    Args:
        rows: measured rows.
        panels: (column, heading) of each panel.
        title: title of the figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7 * len(panels), 7.2))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        drawn = [series(rows, column) for column, _ in panels]
        color = colors(name for lines in drawn for name in lines)
        for axis, (_, heading), lines in zip(axes, panels, drawn, strict=True):
            lines.pop("identity", None)
            for name, points in lines.items():
                points = [(n, y) for n, y in points if y < math.inf]
                if not points:
                    continue
                power = exponent(points)
                style = ":" if name in CONTROLS else "--" if name in PEERS else "-"
                axis.plot(
                    *zip(*points, strict=True), linestyle=style, marker="o", markersize=4,
                    label=name if power is None else f"{name}  $N^{{{power:.2f}}}$",
                    color=color[name], linewidth=2.8 if name in (BASE, EAGER) else 1.7,
                )  # fmt: skip
                place = crossing(points, lines.get(BASE, []))
                if place is not None and name in PAIRS and points[0][0] < place < math.inf:
                    axis.axvline(place, color=color[name], linewidth=0.9, linestyle=":")
                    axis.annotate(
                        f"{place:,.0f}", (place, 0.01), xycoords=("data", "axes fraction"),
                        rotation=90, fontsize=9, color=color[name], ha="right", va="bottom",
                    )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            sizes = sorted({row["size"] for row in rows})
            log_scale(axis.xaxis, sizes)
            log_scale(axis.yaxis)
            axis.set_xlabel("tokens N" if rows[0]["kind"] == "mixer" else "image size (pixels)")
            axis.set_title(heading, loc="left", fontsize=13)
            axis.grid(axis="y", color="#eaeef2")
            axis.legend(
                frameon=False, fontsize=9, ncols=3, loc="upper center", columnspacing=1.2,
                handlelength=2.4, bbox_to_anchor=(0.5, -0.13),
            )  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.tight_layout()
    return figure


def headline(rows: Sequence[Row], device: str) -> Figure:
    """Plot the time and peak memory of a training step by sequence length, for five mixers.

    Args:
        rows: measured rows of single layers, all with the same batch size and precision.
        device: name of the device, for the subtitle.

    Raises:
        ValueError: if batch sizes or precisions differ, or if fused softmax is missing.
    """
    rows = [r for r in rows if r["name"] in HEADLINE and r["mode"] == "eager"]
    if len({(row["batch"], row["dtype"]) for row in rows}) != 1 or BASE not in series(
        rows, "step_ms_p50"
    ):
        raise ValueError("headline() needs rows of fused softmax, one batch size and one precision")
    cpu = " (CPU)" if all(row["reserved_mib"] is None for row in rows) else ""
    panels = [("step_ms_p50", "Time (ms)"), ("peak_mib", "Peak memory (MiB)")]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.7))
        for axis, (column, heading) in zip(figure.subplots(1, 2), panels, strict=True):
            ends = {}
            for name, points in series(rows, column).items():
                points = [(n, y) for n, y in points if y < math.inf]
                width = 3.0 if name == BASE else 2.2
                axis.plot(
                    *zip(*points, strict=True), color=_COLORS[name], linewidth=width,
                    marker="o", markersize=4, zorder=3 if name == BASE else 2,
                )  # fmt: skip
                ends[name] = points[-1]
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            sizes = sorted({row["size"] for row in rows})
            log_scale(axis.xaxis, sizes)
            log_scale(axis.yaxis)
            axis.set_xlabel("tokens N")
            axis.set_title(heading, loc="left", fontsize=13)
            axis.grid(axis="y", color="#eaeef2")
            low, high = (math.log(y) for y in axis.get_ylim())
            heights = _spread(
                {name: (math.log(y) - low) / (high - low) for name, (_, y) in ends.items()}, 0.058
            )
            for name, height in heights.items():
                x, y = ends[name]
                axis.annotate(
                    f"{HEADLINE[name]}  {number(y)}", (x, y), (1.02, height),
                    textcoords="axes fraction", color=_COLORS[name], va="center", fontsize=11,
                    weight="bold" if name == BASE else "normal", annotation_clip=False,
                )  # fmt: skip
        figure.suptitle(
            "Forward and backward pass of one attention layer", x=0.01, ha="left", weight="bold"
        )
        figure.text(
            0.01, 0.885,
            f"{device}{cpu}, {_PRECISION[rows[0]['dtype']]}, batch {rows[0]['batch']}, 4 heads of "
            "width 64; 64 landmarks, rank 64, 266 random features",
            color="#57606a", fontsize=11,
        )  # fmt: skip
        figure.tight_layout(rect=(0, 0, 1, 0.95), w_pad=2)
    return figure


def _spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Move labels apart to a distance of at least ``gap``, keeping their order."""
    names = sorted(heights, key=lambda name: heights[name])
    placed = [heights[name] for name in names]
    for _ in range(100):
        for i in range(len(placed) - 1):
            if (overlap := gap - (placed[i + 1] - placed[i])) > 1e-9:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
    return dict(zip(names, placed, strict=True))


def bars(rows: Sequence[Row], panels: Sequence[tuple[str, str]], title: str) -> Figure:
    """Plot columns as bars, one panel per column and one bar per model.

    Args:
        rows: measured rows, all of one size.
        panels: (column, heading) of each panel.
        title: title of the figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6 * len(panels), 1.4 + 0.34 * len(rows)))
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (column, heading) in zip(axes, panels, strict=True):
            known = [row for row in rows if row.get(column)]
            drawn = axis.barh([label(r) for r in known], [r[column] for r in known], color=BLUE)
            axis.bar_label(drawn, fmt=number, padding=3, fontsize=9)
            axis.margins(x=0.14)
            axis.xaxis.set_major_formatter("{x:,g}")
            axis.set_title(heading, loc="left", fontsize=13)
        axes[0].invert_yaxis()
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.tight_layout()
    return figure


def wins(rows: Sequence[Row]) -> Table:
    """Tabulate the scaling exponents of each mixer and its crossovers with softmax.

    Crossovers are the lengths from which on a mixer is faster and smaller than fused softmax, and
    smaller than materialized softmax.
    """
    time, peak = series(rows, "step_ms_p50"), series(rows, "peak_mib")

    def power(points: Points) -> str:
        found = exponent(points)
        return "" if found is None else f"{found:.2f}"

    def since(points: Points, base: Points) -> str:
        found = crossing(points, base)
        if found is None or points == base:
            return ""
        if math.isinf(found):
            return "never"
        first = min(n for n, _ in points if n in dict(base))
        return "always" if found == first else f"{found:,.0f}"

    names = sorted(set(time) & set(peak) - set(CONTROLS), key=list(time).index)
    lines = [
        [
            name, power(time[name]), power(peak[name]),
            since(time[name], time.get(BASE, [])), since(peak[name], peak.get(BASE, [])),
            since(peak[name], peak.get(EAGER, [])),
        ]
        for name in names
    ]  # fmt: skip
    headings = [
        "mixer", "time grows as N to the power", "memory grows as N to the power",
        "faster than fused softmax from", "less memory than fused softmax from",
        "less memory than materialized softmax from",
    ]  # fmt: skip
    caption = (
        "scaling and crossovers in tokens: time and peak memory of a training step; exponents are "
        f"fitted from {FROM:,} tokens on; never and always refer to the lengths measured"
    )
    return Table(headings, lines, caption)


def savings(rows: Sequence[Row], fused: str, materialized: str, size: int) -> Table:
    """Tabulate the peak memory of both softmaxes relative to that of each mixer or model.

    Args:
        rows: measured rows.
        fused: label of the rows with fused softmax.
        materialized: label of the rows with materialized softmax.
        size: sequence length or image size to compare.
    """
    peak = {name: dict(points).get(size) for name, points in series(rows, "peak_mib").items()}
    lines = [
        [name, number(mine)]
        + [_times(peak.get(softmax), mine) for softmax in (materialized, fused)]
        for name, mine in peak.items()
        if mine is not None and mine < math.inf and name not in (materialized, *CONTROLS)
    ]
    headings = ["", "peak, MiB", f"{materialized} / this", f"{fused} / this"]
    return Table(headings, lines, f"peak memory of a training step at {size:,}")


def _times(value: float | None, other: float) -> str:
    return "" if value is None else "OOM" if math.isinf(value) else f"{value / other:.2f}"


def main(arguments: Sequence[str]) -> None:
    """Draw the figure of the README: ``python -m train.benchmark.pictures MIXERS.csv cost.png``.

    Args:
        arguments: CSV file of single layers, and PNG file to write.
    """
    source, out = map(Path, arguments)
    comments, rows = read_rows(source)
    save(headline(rows, comments[0].partition(": ")[2]), out, source=fingerprint(source))


if __name__ == "__main__":
    main(sys.argv[1:])
