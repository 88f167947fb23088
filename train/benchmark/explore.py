"""Interactive figures of the measurements: curves by length, and all values at one length."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import plotly.graph_objects as go

from ..html import Table, View
from ..plots import BLUE
from .cases import BASE
from .controls import CONTROLS
from .pictures import HEADLINE, PEERS, colors, wins
from .rows import (
    Row,
    by_size,
    cell,
    is_noisy,
    key,
    label,
    number,
    package_table,
    ratio,
    refusals,
)

Rows = Mapping[tuple[Any, ...], Row]  # by key, to find those of fused softmax
CHOICES = ("machine", "measured", "precision", "quantity", "size")
FEW = 8  # curves shown at first if none of the headline's is there
LIMITS = (
    "~ marks a time whose 20th and 80th percentiles differ by more than 15% of the median, and a "
    "ratio that involves such a time. Empty cells were not measured, OOM ran out of memory. Axes "
    "are logarithmic, so a value of 0 is in the table alone. Ratios to fused softmax are between "
    "rows that were both compiled or both not. Weights are random; the costs measured here do not "
    "depend on them."
)
_DASHES = {"packages": "dash", "controls": "dot", "compiled": "dashdot"}
_GRID = {"gridcolor": "#eaeef2", "linecolor": "#9aa5b1", "zeroline": False, "automargin": True}
_ASIDE = {"fixedrange": True, "visible": False}  # axis of what has no value
_LOG = {"type": "log", "tickformat": ",~r", "dtick": "D2", **_GRID}  # ticks at 1, 2 and 5


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What a figure shows of each row.

    Args:
        heading: name and unit.
        column: column of the rows.
        unit: unit of values under the pointer.
        relative: whether to divide by the value of fused softmax.
    """

    heading: str
    column: str
    unit: str
    relative: bool = False

    def value(self, row: Row, rows: Rows) -> float | None:
        """Return the value of a row, or None if it is unknown."""
        if self.relative:
            return ratio(row, rows.get(key(row | {"name": BASE})), self.column)
        known: float | None = row[self.column]
        return known

    def cell(self, row: Row, rows: Rows) -> str | None:
        """Format the value of a row; ~ marks a noisy one."""
        if not self.relative:
            return cell(row, self.column)
        found = self.value(row, rows)
        if found is None:
            return None
        pair = (row, rows[key(row | {"name": BASE})])
        noisy = "p50" in self.column and any(is_noisy(one, self.column) for one in pair)
        return f"{found:.3g}" + ("~" if noisy else "")

    def hover(self, row: Row, rows: Rows) -> str:
        """Describe the value of a row, with its percentiles if it is a time."""
        said = f"{self.cell(row, rows)} {self.unit}"
        low, high = (row.get(self.column.replace("p50", p)) for p in ("p20", "p80"))
        if self.relative or "p50" not in self.column or low is None or high is None:
            return said
        return f"{said} (p20 to p80: {number(low)} to {number(high)})"


QUANTITIES = (
    Quantity("training step, median ms", "step_ms_p50", "ms"),
    Quantity("training step, time / fused softmax", "step_ms_p50", "× fused softmax", True),
    Quantity("peak memory of a training step, MiB", "peak_mib", "MiB"),
    Quantity("peak memory / fused softmax", "peak_mib", "× fused softmax", True),
    Quantity("saved for backward, MiB", "kept_mib", "MiB"),
    Quantity("reserved by the allocator, MiB", "reserved_mib", "MiB"),
    Quantity("GPU memory in use according to the driver, MiB", "device_mib", "MiB"),
    Quantity("inference, median ms", "infer_ms_p50", "ms"),
    Quantity("images/s in training", "images_per_second", "images/s"),
)


def group_of(row: Row) -> str:
    """Name the group that a row's curve is switched on and off in."""
    if row["mode"] != "eager":
        return str(row["mode"])
    if row["name"] in CONTROLS:
        return "controls"
    return "packages" if row["name"] in PEERS else f"{row['kind']}s"


def by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by their label: those of the headline first, compiled ones last."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(label(row), []).append(row)
    first, groups = list(HEADLINE), ["mixers", "models", "packages", "controls", "compiled"]

    def place(name: str) -> tuple[int, int]:
        group = groups.index(group_of(found[name][0]))
        return group, first.index(name) if name in first else len(first)

    return {name: found[name] for name in sorted(found, key=place)}


def size_of(row: Row) -> str:
    """Describe the size of a row."""
    return f"{row['size']:,} {'tokens' if row['kind'] == 'mixer' else 'pixels'}"


def _hues(rows: Collection[Row]) -> dict[str, str]:
    """Choose the color of each label; compiled mixers and packages get that of our mixer."""
    names = {label(r): r["name"] if r["kind"] == "mixer" else label(r) for r in rows}
    color = colors(names.values())
    return {name: color[plain] for name, plain in names.items()}


def _layout(quantity: Quantity, where: str, height: int) -> dict[str, Any]:
    """Describe what both kinds of figures share."""
    title = quantity.heading[0].upper() + quantity.heading[1:]
    below = "<br>".join(html.escape(line, quote=False) for line in where.splitlines())
    return {
        "template": {}, "height": height, "margin": {"l": 60, "r": 140, "t": 92, "b": 50},
        "title": {"text": title, "subtitle": {"text": below}, "x": 0, "xref": "container",
                  "font": {"size": 17}},
        "font": {"family": "system-ui, sans-serif", "color": "#1f2328"}, "showlegend": False,
        "plot_bgcolor": "white", "hoverlabel": {"namelength": -1, "bgcolor": "white"},
    }  # fmt: skip


def _drawable(values: Iterable[float | None]) -> list[float | None]:
    """Replace values that a logarithmic axis does not have; those left are gaps."""
    return [None if not value else float(f"{value:.5g}") for value in values]


def curves(rows: Rows, quantity: Quantity, where: str) -> go.Figure:
    """Plot a quantity against size, one curve per mixer or model; crosses ran out of memory.

    Args:
        rows: rows of one kind, precision and batch size, by key.
        quantity: what to plot.
        where: machine, precision and batch size, for the subtitle.
    """
    sizes = sorted({row["size"] for row in rows.values()})
    lines, hues = by_label(rows.values()), _hues(rows.values())
    shown = [name for name in HEADLINE if name in lines] or list(lines)[:FEW]
    lost_at = dict.fromkeys(sizes, 0)
    figure = go.Figure(layout=_layout(quantity, where, 540))
    for name, some in lines.items():
        at, group = {row["size"]: row for row in some}, group_of(some[0])
        common: dict[str, Any] = {
            "name": html.escape(name, quote=False), "meta": {"curve": name, "group": group},
            "visible": True if name in shown else "legendonly",
            "hovertemplate": "%{customdata}", "line": {"color": hues[name]},
        }  # fmt: skip
        known = {n: quantity.hover(row, rows) for n, row in at.items()}
        figure.add_scatter(
            x=sizes, y=_drawable(quantity.value(at[n], rows) if n in at else None for n in sizes),
            customdata=[known.get(n) for n in sizes], mode="lines+markers", **common,
        )  # fmt: skip
        figure.data[-1].line.update(
            dash=_DASHES.get(group, "solid"), width=3 if name == BASE else 2
        )
        if lost := [n for n in sizes if n in at and at[n]["status"] == "out of memory"]:
            figure.add_scatter(
                x=lost, y=[lost_at[n] for n in lost], yaxis="y2",
                customdata=["out of memory"] * len(lost), mode="markers+text",
                text=[f"{common['name']}: out of memory "] * len(lost),
                textposition="middle left", textfont={"color": hues[name]},
                marker={"symbol": "x", "size": 9}, **common,
            )  # fmt: skip
            lost_at.update((n, lost_at[n] + 1) for n in lost)
    most = max(lost_at.values())
    strip = min(0.05 * most, 0.3)  # above the curves
    unit = "tokens" if next(iter(rows.values()))["kind"] == "mixer" else "pixels"
    figure.update_layout(
        meta={"names": True}, hovermode="x unified",
        yaxis2={"range": [most - 0.4, -0.6], "domain": [1 - strip, 1], **_ASIDE},
        yaxis={**_LOG, "domain": [0, 1 - strip]},
        xaxis={
            "type": "log", "tickvals": sizes, "ticktext": [f"{n:,}" for n in sizes],
            "title": {"text": "tokens N" if unit == "tokens" else "image size (pixels)"},
            "unifiedhovertitle": {"text": f"%{{x:,}} {unit}"},
            "range": [math.log10(sizes[0]) - 0.05, math.log10(sizes[-1]) + 0.05], **_GRID,
        },
    )  # fmt: skip
    if quantity.relative:
        figure.add_hline(1, line={"color": "#57606a", "width": 1, "dash": "dot"}, layer="below")
    return figure


def dots(some: Sequence[Row], rows: Rows, quantity: Quantity, where: str) -> go.Figure:
    """Plot a quantity at one size, one line per mixer or model, the smallest value on top.

    Args:
        some: the rows of this size.
        rows: rows of all sizes, by key.
        quantity: what to plot.
        where: machine, precision, batch size and size, for the subtitle.
    """
    found = {label(row): (quantity.value(row, rows), row) for row in some}
    mixers = some[0]["kind"] == "mixer"
    hues = _hues(rows.values()) if mixers else dict.fromkeys(found, BLUE)
    known = sorted((value, name) for name, (value, _) in found.items() if value)
    lost = [name for name, (_, row) in found.items() if row["status"] == "out of memory"]
    names = {name: html.escape(name, quote=False) for name in (*(n for _, n in known), *lost)}
    figure = go.Figure(layout=_layout(quantity, where, 150 + 24 * len(names)))
    figure.add_scatter(
        x=_drawable(value for value, _ in known), y=[names[name] for _, name in known],
        text=[f" {quantity.cell(found[name][1], rows)}" for _, name in known],
        customdata=[quantity.hover(found[name][1], rows) for _, name in known],
        mode="markers+text", textposition="middle right", cliponaxis=False,
        marker={"size": 11, "color": [hues[name] for _, name in known]},
        hovertemplate="%{y}: %{customdata}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[0] * len(lost), y=[names[name] for name in lost], xaxis="x2", mode="text",
        text=[" out of memory"] * len(lost), textposition="middle right", hoverinfo="skip",
    )  # fmt: skip
    ends = [math.log10(value) for value, _ in (known[0], known[-1])]
    room = 0.06 * (ends[1] - ends[0]) + 0.05
    figure.update_layout(
        hovermode="closest", margin={"r": 70},
        xaxis2={"overlaying": "x", "range": [0, 1], **_ASIDE},
        xaxis={**_LOG, "range": [ends[0] - room, ends[1] + room],
               "dtick": 1 if ends[1] - ends[0] > 1 else "D2"},  # the values are written out
        yaxis={"type": "category", "categoryorder": "array",
               "categoryarray": list(names.values()), "range": [len(names) - 0.3, -0.7], **_GRID},
    )  # fmt: skip
    if quantity.relative:
        figure.add_vline(1, line={"color": "#57606a", "width": 1, "dash": "dot"}, layer="below")
    return figure


def at_size(some: Sequence[Row], rows: Rows, quantities: Sequence[Quantity]) -> Table:
    """Tabulate all quantities at one size, with one line per mixer or model.

    Args:
        some: the rows of this size.
        rows: rows of all sizes, by key.
        quantities: quantities, one per column.
    """
    lines = []
    for name, (row, *_) in by_label(some).items():
        lost = row["status"] == "out of memory"
        cells = ["OOM" if lost else quantity.cell(row, rows) or "" for quantity in quantities]
        if any(cells):
            lines.append([name, *cells])
    return Table([some[0]["kind"], *(q.heading for q in quantities)], lines, size_of(some[0]))


def views(machine: str, measured: str, rows: Sequence[Row], comments: Sequence[str]) -> list[View]:
    """Build the views of rows that share their kind, precision and batch size.

    Args:
        machine: device and version of PyTorch.
        measured: what was measured.
        rows: these rows.
        comments: comment lines of their file.

    Returns:
        Views for each quantity and size, and one that is shown with all of them.
    """
    mixers, index = rows[0]["kind"] == "mixer", {key(row): row for row in rows}
    group = (machine, measured, f"{rows[0]['dtype']}, batch {rows[0]['batch']}")
    where = f"{machine}\n{group[-1]}"
    sizes: dict[int, list[Row]] = {}
    for row in rows:
        sizes.setdefault(row["size"], []).append(row)
    every = "all lengths" if mixers else "all image sizes"
    heading = "tokens" if mixers else "pixels on a side"
    known = [q for q in QUANTITIES if any(q.value(row, index) for row in rows)]
    made = []
    for quantity in known or QUANTITIES[:1]:
        choice = (*group, quantity.heading)
        cells = partial(quantity.cell, rows=index)
        if len(sizes) > 1 or not known:
            figure = curves(index, quantity, where) if known else None
            table = by_size(rows, cells, heading, quantity.heading)
            made.append(View((*choice, every), figure, [table]))
        for some in sizes.values():
            if any(quantity.value(row, index) for row in some):
                figure = dots(some, index, quantity, f"{where}, {size_of(some[0])}")
                made.append(View((*choice, size_of(some[0])), figure))
    for some in sizes.values() if known else ():
        made.append(View((*group, None, size_of(some[0])), None, [at_size(some, index, known)]))
    eager = [row for row in rows if row["mode"] == "eager"]
    tables = [package_table(rows), wins(eager)] if mixers else []
    notes = [*comments, *refusals(rows), LIMITS]
    made.append(View((*group, None, None), None, [table for table in tables if table.rows], notes))
    return made
