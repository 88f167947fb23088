"""The page of conversions: accuracy after each stage, time and memory by the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .benchmark.pictures import colors, crossing
from .convert_cost import TEACHER, Cost
from .html import Section, Table, write_page
from .plots import STYLE, log_scale, save
from .provenance import fingerprint

COLUMNS = {
    "swap": "after the swap", "attention": "after stage 1", "features": "after stage 2",
    "scratch": "from scratch",
}  # fmt: skip
RESULTS = "conversion.json"
_NOTE = (
    "error: |ours - theirs| / |theirs| of the attention output, given the teacher's input, mean "
    "over layers; cosine: similarity of the last features; agreement: fraction of equal "
    "predictions; all on validation images after stage 2. The minutes do not include training from "
    "scratch."
)


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write conversion.html and its figures, from the results in the folder."""
    source = fingerprint(folder / RESULTS)
    sections = [Section("Conversions", accuracy_figure(found), [table(found)], [_NOTE])]
    if cost := found.get("cost"):
        sections.append(Section("Cost", cost_figure(cost), [cost_table(cost)]))
    for section in sections:
        assert section.figure is not None
        save(section.figure, folder / f"{section.title.lower()}.png", source)
    write_page(folder / "conversion.html", "Conversions", sections)


def table(found: dict[str, Any]) -> Table:
    """Tabulate the accuracy after each stage and the distance from the teacher at the end."""
    rows = []
    for name, row in found["rows"].items():
        last = row.get("features", {})
        minutes = sum(row.get(c, {}).get("minutes", 0.0) for c in ("attention", "features"))
        rows.append(
            [_text(name)]
            + [f"{row[c]['test_top1']:.2%}" if c in row else "" for c in COLUMNS]
            + [f"{last[c]:.3f}" if c in last else "" for c in ("error", "cosine")]
            + [f"{last['agreement']:.1%}" if "agreement" in last else "", f"{minutes:.1f}"]
        )
    heads = ["mixer", *COLUMNS.values(), "error", "cosine", "agreement", "minutes"]
    caption = f"test top-1; the teacher has {found['teacher']:.2%}"
    return Table(heads, [["teacher", f"{found['teacher']:.2%}", *[""] * 7], *rows], caption)


def accuracy_figure(found: dict[str, Any]) -> Figure:
    """Plot the accuracy of each conversion after each stage."""
    names = list(found["rows"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.6 + 0.5 * len(names)))
        axis = figure.subplots()
        axis.axvline(100 * found["teacher"], color="#57606a", linestyle="--", label="teacher")
        for (key, label), marker in zip(COLUMNS.items(), "xos^", strict=True):
            points = [
                (100 * row[key]["test_top1"], i)
                for i, row in enumerate(found["rows"].values())
                if key in row
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker, label=label, markersize=8)
        axis.set_yticks(range(len(names)), [_text(name) for name in names])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel("test top-1, %")
        axis.grid(axis="x", color="#eaeef2")
        figure.legend(
            *axis.get_legend_handles_labels(), ncols=5, columnspacing=1.2, frameon=False,
            loc="upper left",
        )  # fmt: skip
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    return figure


def cost_figure(rows: Sequence[Cost]) -> Figure:
    """Plot time and memory against the number of tokens."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6))
        for axis, (column, title) in zip(
            figure.subplots(1, 2),
            (("ms", "training step, ms"), ("mib", "kept for backward, MiB")),
            strict=True,
        ):
            curves = _curves(rows, column)
            color = colors(list(curves))
            for name, points in curves.items():
                axis.plot(
                    *zip(*points, strict=True), marker="o", label=_text(name), color=color[name],
                    linestyle="--" if name == TEACHER else "-",
                )  # fmt: skip
            axis.set(yscale="log", xlabel="tokens", title=title)
            axis.set_xscale("log", base=2)
            log_scale(axis.xaxis, sorted({row["tokens"] for row in rows}))
            log_scale(axis.yaxis)
            axis.grid(color="#eaeef2")
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, ncols=3, frameon=False, loc="lower center")
        lines = -(-len(handles[1]) // 3)
        figure.tight_layout(rect=(0, 0.07 * lines, 1, 1))
    return figure


def cost_table(rows: Sequence[Cost]) -> Table:
    """Tabulate time and memory relative to the model before conversion, and where it is faster."""
    tokens = sorted({row["tokens"] for row in rows})
    curves = _curves(rows, "ms")
    cost = {(row["name"], row["tokens"]): row for row in rows}
    lines = []
    for name, points in curves.items():
        if name == TEACHER:
            continue
        ratios = []
        for n in tokens:
            ours, theirs = cost.get((name, n)), cost.get((TEACHER, n))
            found = [f"{ours[c] / theirs[c]:.2f}" for c in ("ms", "mib")] if ours and theirs else []
            ratios.append(", ".join(found))
        lines.append([_text(name), *ratios, _from(crossing(points, curves.get(TEACHER, [])))])
    return Table(
        ["mixer", *(f"{n:,}" for n in tokens), "faster from, tokens"], lines,
        "time of a training step and bytes kept for backward, relative to softmax, by tokens",
    )  # fmt: skip


def _curves(rows: Sequence[Cost], column: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append((row["tokens"], row[column]))
    return found


def _text(name: str) -> str:
    return name.replace(":", ", ")


def _from(tokens: float | None) -> str:
    if tokens is None:
        return ""
    return "never" if math.isinf(tokens) else f"{tokens:,.0f}"
