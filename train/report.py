"""Many runs on one page: a table, curves over each other, accuracy against what it costs."""

from __future__ import annotations

import base64
import html
import io
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import write_whole
from .pictures import STYLE

Run = dict[str, Any]
_COLUMNS = [  # heading, key of a run's figures, format
    ("run", "name", "{}"),
    ("test top-1", "test_top1", "{:.2%}"),
    ("val top-1", "val_top1", "{:.2%}"),
    ("epochs", "epochs", "{:.0f}"),
    ("parameters", "parameters", "{:,.0f}"),
    ("peak memory, MiB", "peak_mib", "{:,.0f}"),
    ("images/s", "images_per_second", "{:,.0f}"),
    ("minutes", "minutes", "{:,.1f}"),
    ("device", "device", "{}"),
]
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1f2328; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.35rem 0.8rem; text-align: right; border-bottom: 1px solid #d8dee4;
         white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; }
code { font-size: 0.85rem; overflow-wrap: anywhere; }
"""


def figures(run: Run) -> dict[str, Any]:
    """What the table shows of a run; what is not known is not there."""
    rows, result = run["rows"], run["result"]
    last = run["sessions"][-1] if run["sessions"] else {}
    found = {
        "name": run["folder"].name,
        "epochs": len(rows),
        "val_top1": max(row["val_top1"] for row in rows),
        "images_per_second": rows[-1]["images_per_second"],
        "device": last.get("device"),
        **result,
    }
    return {k: v for k, v in found.items() if v is not None}


def cells(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, the best run first; columns that no run has are left out."""
    known = sorted(map(figures, runs), key=lambda f: -f.get("test_top1", f["val_top1"]))
    columns = [c for c in _COLUMNS if any(c[1] in f for f in known)]
    rows = [[form.format(f[key]) if key in f else "" for _, key, form in columns] for f in known]
    return [heading for heading, _, _ in columns], rows


def table(runs: Sequence[Run]) -> str:
    """For a terminal."""
    headings, rows = cells(runs)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (headings, *rows))
    ]
    return "\n".join(lines)


def markdown(runs: Sequence[Run]) -> str:
    """For the README."""
    headings, rows = cells(runs)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def curves(runs: Sequence[Run]) -> Figure:
    """Validation accuracy of all runs by epoch."""
    colours = [f"C{i}" for i in range(10)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5))
        axis = figure.subplots()
        for run, colour in zip(runs, itertools.cycle(colours), strict=False):
            rows = run["rows"]
            axis.plot(
                [r["epoch"] for r in rows], [100 * r["val_top1"] for r in rows], color=colour,
                marker="o" if len(rows) < 20 else None, label=run["folder"].name,
            )  # fmt: skip
        axis.set(title="validation accuracy (%)", xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
    return figure


def costs(runs: Sequence[Run]) -> Figure | None:
    """Test accuracy against parameters, memory and time; None where no run is complete."""
    known = [f for f in map(figures, runs) if "test_top1" in f]
    panels = [c for c in _COLUMNS if c[1] in ("parameters", "peak_mib", "minutes")]
    panels = [c for c in panels if any(c[1] in f for f in known)]
    if not known or not panels:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 4.6))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axis, (heading, key, _) in zip(axes.flat, panels, strict=True):
            for f in known:
                if key in f:
                    axis.scatter(f[key], 100 * f["test_top1"], s=45)
                    axis.annotate(
                        f["name"], (f[key], 100 * f["test_top1"]), xytext=(5, 4),
                        textcoords="offset points", fontsize=8,
                    )  # fmt: skip
            axis.set(xlabel=heading)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.margins(0.15)
        axes.flat[0].set_ylabel("test accuracy (%)")
        figure.tight_layout()
    return figure


def page(runs: Sequence[Run], path: Path) -> None:
    """One file that needs no network."""
    headings, rows = cells(runs)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    pictures = [("Curves", curves(runs)), ("Accuracy and cost", costs(runs))]
    shown = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="{_inline(figure)}">'
        for title, figure in pictures
        if figure is not None
    )
    commands = "".join(
        f"<p>{html.escape(run['folder'].name)}<br><code>"
        f"{html.escape(shlex.join(run['sessions'][0]['command']))}</code></p>"
        for run in runs
        if run["sessions"]
    )
    write_whole(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Runs</title>'
        f"<style>{_STYLE}</style><h1>{len(runs)} runs</h1>"
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{shown}'
        f"<h2>Commands</h2>{commands}</html>\n",
    )


def _inline(figure: Figure) -> str:
    """A figure as the address of an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
