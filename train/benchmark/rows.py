"""CSV files of measured rows, with comments that describe the method; tables of these rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_whole
from ..html import Table
from ..provenance import device_name, git_revision, versions
from .cases import PAIRS, Case

Row = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = tuple(field.name for field in dataclasses.fields(Case))
COLUMNS = (
    *KEY, "status", "backbone", "tokens", "width", "heads", "parameters", "flops",
    "infer_ms_p20", "infer_ms_p50", "infer_ms_p80", "step_ms_p20", "step_ms_p50", "step_ms_p80",
    "spread", "images_per_second", "kept_mib", "peak_mib", "computed_mib", "reserved_mib",
    "device_mib", "revision",
)  # fmt: skip
METHOD = (
    "each row is measured in its own process; up to 16 processes of one size are interleaved, in",
    "turns of half a second or 20 steps (at least 3 steps if they use much memory); a step is a",
    "forward and a backward pass, with AdamW for models; p20, p50, p80: percentiles over all",
    "steps; spread: (p80 - p20) / p50 of a step; caches are warm: each step follows an identical",
    "one, in memory that the process keeps; kept: memory that autograd saves for the backward",
    "pass; peak: maximum during a step, above the memory held before it (GPU: allocator; CPU:",
    "resident memory, which underestimates peaks of a few MiB, since freed memory is reused);",
    "flops: forward pass of one sample; computed: the peak from shapes alone, without measuring",
)
NOISY = 0.15  # spread above which tables mark a time
_TEXT = {"kind", "name", "dtype", "mode", "mixer", "checkpointing", "status", "backbone"}
_KNOWN = {"kind": {"mixer", "model"}, "mode": {"eager", "compiled"}}
_NUMBERS = set(COLUMNS) - _TEXT - {"revision"}


def machine(device: str = DEVICE) -> tuple[str, str]:
    """Return the device and the versions, which all rows of a file share."""
    known = versions()
    names = ("vision_xformer", "python", "torch", "cuda", "driver")
    listed = ", ".join(f"{name} {known[name]}" for name in names if name in known)
    return f"device: {device_name(torch.device(device))}", f"versions: {listed}"


def revision() -> str:
    """Return the git revision of this code, followed by + if the checkout was modified."""
    git = git_revision()
    return git.get("revision", "unknown")[:12] + ("+" if git.get("dirty") else "")


def write_csv(
    path: Path, lines: Sequence[str], columns: Sequence[str], rows: Sequence[Row]
) -> None:
    """Write comment lines and rows to a CSV file, atomically.

    Args:
        path: file to write.
        lines: comment lines, without the leading #.
        columns: names of the columns.
        rows: rows; values of other columns are ignored.
    """
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in lines)
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_csv(path: Path) -> tuple[list[str], list[Row]]:
    """Read the comment lines and the rows of a CSV file, as text.

    Raises:
        ValueError: if the file is missing, is not a CSV file of the benchmark or is truncated.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file") from error
    comments = [line[2:] for line in lines if line.startswith("# ")]
    rows: list[Row] = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if len(comments) < 2 or not rows:
        raise ValueError(f"{path} has no rows of python -m train.benchmark")
    if torn := [row for row in rows if None in row or None in row.values()]:
        raise ValueError(f"{path} has an incomplete row: {', '.join(map(str, torn[0].values()))}")
    return comments, rows


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Read the comment lines and the rows of a CSV file of measurements.

    Raises:
        ValueError: if the file is missing or does not hold measured rows.
    """
    comments, rows = read_csv(path)
    if missing := set(COLUMNS) - rows[0].keys():
        raise ValueError(f"{path} has no column {min(missing)}: not a file of measured rows")
    try:
        for row in rows:
            row.update({k: _number(row[k]) for k in _NUMBERS})
            row["checkpointing"] = row["checkpointing"] == "True"
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as measured rows: {error}") from error
    if len({key(row) for row in rows}) < len(rows) or not all(row["size"] for row in rows):
        raise ValueError(f"{path} has duplicate rows or a row without a size")
    for column, known in _KNOWN.items():
        if odd := {row[column] for row in rows} - known:
            raise ValueError(f"{path} has {column} {min(odd)!r}, not {' or '.join(sorted(known))}")
    return comments, rows


def check_replaced(path: Path, columns: Sequence[str], content: str) -> None:
    """Raise a ValueError if a file exists that does not start with these columns.

    Args:
        path: file that is about to be replaced.
        columns: names of the first columns.
        content: what such a file has, in words.
    """
    if path.is_file() and list(read_csv(path)[1][0])[: len(columns)] != list(columns):
        raise ValueError(f"--out {path} is not a file of {content}: choose another file")


def take_up(
    path: Path,
    method: Sequence[str],
    command: str,
    read: Callable[[Path], tuple[list[str], list[Row]]] = read_rows,
) -> tuple[list[str], list[Row]]:
    """Read a file that more rows are to be added to; it need not exist.

    Args:
        path: CSV file.
        method: comment lines that describe the method.
        command: command line that adds the rows.
        read: function that reads the file.

    Returns:
        The comment lines of the extended file, and its rows so far.

    Raises:
        ValueError: if the file cannot be read, or is of another device or of other versions.
    """
    commands, rows = [f"command: {command}"], list[Row]()
    if path.is_file():
        comments, rows = read(path)
        if tuple(comments[:2]) != machine():
            raise ValueError(f"{path} is from {comments[0]}, {comments[1]}: choose another --out")
        commands = list(dict.fromkeys([c for c in comments if c.startswith("command")] + commands))
    return [*machine(), *method, *commands], rows


def _number(text: str) -> float | None:
    if not text:
        return None
    value = int(text) if text.isdigit() else float(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"{text} is not a finite number of at least 0")
    return value


def key(row: Row) -> tuple[Any, ...]:
    """Return the values that identify a row."""
    return tuple(row[name] for name in KEY)


def label(row: Row) -> str:
    """Describe a row by its name, mixer, mode and checkpointing, without its size."""
    parts = [row["name"], row["mixer"], row["mode"] if row["mode"] != "eager" else ""]
    return ", ".join(p for p in (*parts, "checkpointing" if row["checkpointing"] else "") if p)


def refusals(rows: Sequence[Row]) -> list[str]:
    """List the reasons of rows that failed; tables already show out of memory."""
    return [
        f"{label(row)} at {row['size']:,}: {row['status']}"
        for row in rows
        if row["status"] not in ("ok", "out of memory")
    ]


def peer(row: Row, rows: Sequence[Row]) -> Row | None:
    """Find the row of the public package that matches one of ours in all but the name."""
    if row["kind"] != "mixer" or row["name"] not in PAIRS:
        return None
    wanted = key(row | {"name": PAIRS[row["name"]][0]})
    return next((other for other in rows if key(other) == wanted), None)


def is_noisy(row: Row, column: str) -> bool:
    """Return whether p20 and p80 differ by more than ``NOISY`` times the median, if known."""
    low, high = (row[column.replace("p50", p)] for p in ("p20", "p80"))
    return None not in (low, high) and bool(high - low > NOISY * row[column])


def ratio(first: Row | None, second: Row | None, column: str) -> float | None:
    """Return the ratio first / second of a column, or None if either is unknown."""
    if first is None or second is None or not first.get(column) or not second.get(column):
        return None
    return float(first[column]) / float(second[column])


def number(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def by_size(
    rows: Sequence[Row], figure: Callable[[Row], str | None], heading: str, caption: str = ""
) -> Table:
    """Tabulate rows with one line per mixer or model and one column per size.

    Out of memory is shown as OOM; lines without any value are omitted.

    Args:
        rows: measured rows.
        figure: function that formats the cell of a row, or returns None for an empty one.
        heading: heading of the sizes.
        caption: caption of the table.
    """
    sizes = sorted({row["size"] for row in rows})
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        cell = "OOM" if row["status"] == "out of memory" else figure(row)
        if cell is not None:
            lines.setdefault(label(row), {})[row["size"]] = cell
    body = [[name, *(cells.get(size, "") for size in sizes)] for name, cells in lines.items()]
    return Table([heading, *(f"{size:,}" for size in sizes)], body, caption)


def cell(row: Row, column: str) -> str | None:
    """Format a value, or return None if it is unknown; ~ marks noisy medians."""
    if row.get(column) is None:
        return None
    noisy = column.endswith("_ms_p50") and is_noisy(row, column)
    return number(row[column]) + ("~" if noisy else "")


def column_table(rows: Sequence[Row], column: str, caption: str) -> Table:
    """Tabulate a column with :func:`by_size`; ~ marks noisy medians."""
    heading = "tokens" if rows[0]["kind"] == "mixer" else "pixels on a side"
    return by_size(rows, lambda row: cell(row, column), heading, caption)


def package_table(rows: Sequence[Row]) -> Table:
    """Tabulate the step time of the packages relative to ours; ~ marks noisy ratios."""

    def figure(row: Row) -> str | None:
        other = peer(row, rows)
        found = ratio(other, row, "step_ms_p50")
        if other is None or found is None:
            return None
        noisy = any(is_noisy(one, "step_ms_p50") for one in (row, other))
        return f"{found:.2f}" + ("~" if noisy else "")

    ours = [row for row in rows if row["name"] in PAIRS]
    return by_size(ours, figure, "tokens", "training step, package / ours")
