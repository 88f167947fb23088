"""Report of several runs on one page: a table, learning curves, and accuracy against cost."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .cli import command_text
from .fonts import plain_text, short
from .html import Section, Table, write_page
from .plots import GREY, STYLE

Run = dict[str, Any]
_COLUMNS = [  # heading, key of figures(), format
    ("run", "name", "{}"),
    ("data", "data", "{}"),
    ("test top-1", "test_top1", "{:.2%}"),
    ("val top-1", "val_top1", "{:.2%}"),
    ("epochs", "epochs", "{:.0f}"),
    ("parameters", "parameters", "{:,.0f}"),
    ("peak memory, MiB", "peak_mib", "{:,.0f}"),
    ("images/s", "images_per_second", "{:,.0f}"),
    ("minutes", "minutes", "{:,.1f}"),
    ("device", "device", "{}"),
]
LIMITS = (
    "Error bars span the seeds, if there are several. Time and memory are those of whole runs, on "
    "a machine that may have been shared; they do not measure the cost of a mixer alone."
)
_COSTS = ("parameters", "peak_mib", "images_per_second", "minutes")


def name_of(run: Run) -> str:
    """Return the name of a run: that of its folder, unless others have the same."""
    return str(run.get("name") or Path(os.path.abspath(run["folder"])).name)


def data_of(run: Run) -> str:
    """Return the dataset of a run, by name and folder; "" if it is unknown."""
    data = run["config"].get("data", {})
    folder = Path(data.get("root") or "").name
    return ", ".join(part for part in (data.get("name", ""), folder) if part)


def figures(run: Run) -> dict[str, Any]:
    """Collect the values of a run that the table shows; unknown ones are left out."""
    rows, result = run["rows"], run["result"]
    last = run["sessions"][-1] if run["sessions"] else {}
    found = {
        "name": name_of(run),
        "data": data_of(run) or None,
        "epochs": len(rows),
        "val_top1": max(row["val_top1"] for row in rows),
        "images_per_second": rows[-1]["images_per_second"],
        "device": last.get("device"),
        **result,
    }
    return {k: v for k, v in found.items() if v is not None}


def table(runs: Sequence[Run]) -> Table:
    """Tabulate runs, best first; columns that are unknown for all runs are left out."""
    known = sorted(map(figures, runs), key=lambda f: -f.get("test_top1", f["val_top1"]))
    columns = [c for c in _COLUMNS if any(c[1] in f for f in known)]
    rows = [[form.format(f[key]) if key in f else "" for _, key, form in columns] for f in known]
    return Table([heading for heading, _, _ in columns], rows)


def curves(runs: Sequence[Run]) -> Figure:
    """Plot the validation accuracy of all runs by epoch."""
    text, names = plain_text([*map(name_of, runs)])
    with mpl.rc_context({**STYLE, **text}):
        figure = Figure(figsize=(10, 5))
        axis = figure.subplots()
        for run, i in zip(runs, itertools.cycle(range(10)), strict=False):
            rows = run["rows"]
            axis.plot(
                [r["epoch"] for r in rows], [100 * r["val_top1"] for r in rows], color=f"C{i}",
                marker="o" if len(rows) < 20 else None,
            )  # fmt: skip
        axis.set(title="Validation accuracy (%)", xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend = {"frameon": False, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
        # passed explicitly, as matplotlib ignores labels that begin with _
        axis.legend(axis.lines, [short(name, 40) for name in names], **legend)
        figure.tight_layout()
    return figure


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Group complete runs that differ only in their seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if "test_top1" in run["result"]:
            config = {k: v for k, v in run["config"].items() if k not in ("seed", "run_dir")}
            key = json.dumps(config, sort_keys=True) if config else str(run["folder"])
            groups.setdefault(key, []).append(run)
    return list(groups.values())


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the Pareto front of low cost and high accuracy.

    Args:
        points: (cost, accuracy) pairs.

    Returns:
        Indices of the points that no other point beats in both, sorted by cost.
    """
    best, kept = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept


def costs(runs: Sequence[Run]) -> Figure | None:
    """Plot test accuracy against each cost, with the Pareto front as a line.

    Error bars span the seeds.

    Args:
        runs: runs on one dataset.

    Returns:
        The figure, or None if no run is complete or no cost is known for all of them.
    """
    groups = [[figures(run) for run in group] for group in by_seed(runs)]
    panels = [c for c in _COLUMNS if c[1] in _COSTS]
    panels = [c for c in panels if all(c[1] in f for group in groups for f in group)]
    if not groups or not panels:
        return None
    tops = [[100 * f["test_top1"] for f in group] for group in groups]
    means = [sum(top) / len(top) for top in tops]
    text, names = plain_text([group[0]["name"] for group in groups])
    with mpl.rc_context({**STYLE, **text}):
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(11, 4.4 * rows))
        axes = figure.subplots(rows, 2, sharey=True, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (heading, key, _) in zip(axes.flat, panels, strict=False):
            cost = [sum(f[key] for f in group) / len(group) for group in groups]
            sign = -1 if key == "images_per_second" else 1  # higher is better
            best = front([(sign * x, y) for x, y in zip(cost, means, strict=True)])
            axis.plot([cost[i] for i in best], [means[i] for i in best], color=GREY, zorder=0)
            for name, top, mean, x in zip(names, tops, means, cost, strict=True):
                bars = [[mean - min(top)], [max(top) - mean]]
                axis.errorbar(x, mean, bars, fmt="o", markersize=7, capsize=4)
                axis.annotate(
                    short(name, 40), (x, mean), xytext=(6, 5), textcoords="offset points",
                    fontsize=9,
                )  # fmt: skip
            axis.set(xlabel=heading)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.margins(0.2)
        for row in axes:
            row[0].set_ylabel("test accuracy (%)")
        figure.tight_layout()
    return figure


def _drawn(draw: Callable[[Sequence[Run]], Figure | None], runs: Sequence[Run]) -> Figure | None:
    """Return a figure, or None after a warning if it cannot be drawn."""
    try:
        figure = draw(runs)
        if figure is not None:
            figure.draw_without_rendering()
    except Exception as error:  # fonts or unusual values
        print(f"warning: {draw.__name__} could not be drawn: {error!r}", file=sys.stderr)
        return None
    return figure


def commands(runs: Sequence[Run]) -> list[str]:
    """List the command that started each run."""
    return [
        f"{name_of(run)}: {command_text(run['sessions'][0]['command'])}"
        for run in runs
        if run["sessions"]
    ]


def cost_sections(runs: Sequence[Run]) -> list[Section]:
    """Build a section on accuracy and cost for each dataset, with a figure and a table."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        sets.setdefault(data_of(run), []).append(run)
    return [
        Section(
            f"Accuracy and cost: {name}" if name else "Accuracy and cost",
            figure,
            [table(some)],
            [*commands(some), LIMITS],
        )
        for name, some in sets.items()
        if (figure := _drawn(costs, some)) is not None
    ]


def page(runs: Sequence[Run], path: Path) -> None:
    """Write the report as one self-contained HTML file.

    Args:
        runs: runs, as :func:`train.commands.read_runs` returns them.
        path: file to write.
    """
    sections = [
        Section("All runs", None, [table(runs)], commands(runs)),
        Section("Learning curves", _drawn(curves, runs)),
        *cost_sections(runs),
    ]
    write_page(path, f"{len(runs)} runs", sections)
