"""The figure and the table of a file of ``plan``: the largest batch by image size and memory."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..html import Section, Table
from ..plots import STYLE, log_scale
from .cases import EAGER, mixer_of
from .pictures import HEADLINE, colors
from .rows import Row

PREFIX = "batch in "
_NAMED = {**HEADLINE, EAGER: "softmax (materialized)"}
_GREY = "#d8dee4"
_COLUMNS = 4  # of the legend


def fits_section(comments: Sequence[str], rows: Sequence[Row]) -> Section:
    """Build the section of a file of ``plan --memory``, read as text.

    Raises:
        ValueError: if the file has no largest batches, or a number cannot be read.
    """
    memories = [column for column in rows[0] if column.startswith(PREFIX)]
    if not memories:
        raise ValueError("no largest batches: run plan with --memory")
    names = sorted({row["name"] for row in rows})
    curves: dict[str, dict[int, list[int]]] = {}
    for row in rows:
        if len(names) == 1:
            name = row["mixer"] or mixer_of(row["name"]) or row["name"]
        else:
            name = ", ".join(part for part in (row["name"], row["mixer"]) if part)
        if row["status"] == "ok":
            curves.setdefault(name, {})[int(row["size"])] = [int(row[m]) for m in memories]
    title = f"The largest batch of {', '.join(names)}"
    figure = fits_figure(curves, memories, title, "".join(comments[2:3]))
    return Section(title, figure, fits_tables(curves, memories), comments)


def fits_tables(curves: dict[str, dict[int, list[int]]], memories: Sequence[str]) -> list[Table]:
    """Tabulate the largest batch: a table for each memory, a column for each image size."""
    sizes = sorted({size for points in curves.values() for size in points})
    return [
        Table(
            ["mixer", *(f"{size:,}" for size in sizes)],
            [
                [name, *(_batch(points[size][i]) if size in points else "" for size in sizes)]
                for name, points in curves.items()
            ],
            f"largest batch in {memory.removeprefix(PREFIX)}, by image size in pixels",
        )
        for i, memory in enumerate(memories)
    ]


def _batch(count: int) -> str:
    return f"{count:,}" if count else "none"


def fits_figure(
    curves: dict[str, dict[int, list[int]]], memories: Sequence[str], title: str, subtitle: str
) -> Figure:
    """Plot the largest batch against the image size, a panel for each memory.

    Args:
        curves: largest batch in each memory, by mixer and image size; of several models, by
            "MODEL" or "MODEL, MIXER".
        memories: names of the columns.
        title: title of the figure.
        subtitle: what was computed.
    """
    named = [name for name in _NAMED if name in curves] or [
        name for name in curves if name.partition(", ")[2] in ("", *_NAMED)
    ]
    palette = colors(named)
    sizes = sorted({size for points in curves.values() for size in points})
    others = len(named) < len(curves)
    height = 1.2 + 3.9 * -(-len(memories) // 2)
    more = 0.32 * max(0, -(-(len(named) + others) // _COLUMNS) - 2)  # lines of the legend
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, height + more))
        axes = figure.subplots(-(-len(memories) // 2), 2, squeeze=False, sharex=True, sharey=True)
        for axis in axes.flat[len(memories) :]:
            axis.set_visible(False)
        for i, (axis, memory) in enumerate(zip(axes.flat, memories, strict=False)):
            axis.set(xscale="log", yscale="log")
            for name, points in sorted(curves.items(), key=lambda item: item[0] in named):
                line = [(n, points[n][i]) for n in sorted(points) if points[n][i]]
                if line:
                    axis.plot(
                        *zip(*line, strict=True), color=palette.get(name, _GREY),
                        linewidth=2.2 if name in named else 1.2, marker="o",
                        markersize=4 if name in named else 2.5,
                    )  # fmt: skip
            axis.set_title(memory.removeprefix(PREFIX), loc="left", fontsize=13)
            log_scale(axis.xaxis, sizes)
            log_scale(axis.yaxis)
            axis.tick_params(labelbottom=True)
            axis.grid(axis="y", color="#eaeef2")
        for axis in axes[-1]:
            axis.set_xlabel("image size (pixels)")
        for axis in axes[:, 0]:
            axis.set_ylabel("largest batch")
        entries = {
            _NAMED.get(name, name): Line2D([], [], color=palette[name], linewidth=2.2, marker="o")
            for name in named
        }
        if others:
            entries["other mixers"] = Line2D([], [], color=_GREY, marker="o")
        figure.legend(
            list(entries.values()), list(entries), ncols=_COLUMNS, frameon=False,
            loc="lower center", fontsize=11,
        )  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.text(0.01, 1 - 0.45 / figure.get_figheight(), subtitle, va="top", color="#57606a")
        bottom = (0.07 * height + more) / figure.get_figheight()
        figure.tight_layout(rect=(0, bottom, 1, 1 - 0.6 / figure.get_figheight()))
    return figure
