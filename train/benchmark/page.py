"""Tables and figures of the measurements: PNG files and one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..html import Section, write_page
from ..plots import save
from ..provenance import fingerprint
from .errors import error_section
from .pictures import bars, lengths, wins
from .rows import Row, column_table, package_table, read_csv, read_rows, refusals

PANELS = {
    "Memory": [("kept_mib", "saved for backward, MiB"), ("peak_mib", "peak of a step, MiB")],
    "Time": [("step_ms_p50", "training step, ms"), ("infer_ms_p50", "inference, ms")],
}
_TABLES = {
    "Memory": {"kept_mib": "saved for backward, MiB", "peak_mib": "peak of a training step, MiB",
               "reserved_mib": "reserved by the allocator, MiB",
               "device_mib": "GPU memory in use according to the driver, MiB"},
    "Time": {"step_ms_p50": "training step, median ms", "infer_ms_p50": "inference, median ms",
             "images_per_second": "images/s in training"},
}  # fmt: skip
LIMITS = (
    "~ marks a time whose 20th and 80th percentiles differ by more than 15% of the median, and a "
    "ratio that involves such a time. Empty cells were not measured. Weights are random; the costs "
    "measured here do not depend on them."
)


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows that can share a figure, keyed by a description of what they share."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        shared = f"{row['kind']}s, {row['dtype']}, batch {row['batch']}"
        found.setdefault(shared, []).append(row)
    return found


def sections(file: Path) -> dict[str, Section]:
    """Build the sections of one CSV file, keyed by the name of their figure.

    Raises:
        ValueError: if the file is not one of the benchmark.
    """
    comments, found = read_csv(file)
    stem = f"{file.absolute().parent.name}-{file.stem}"
    if "error" in found[0]:
        try:
            return {stem: error_section(comments, found)}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    _, rows = read_rows(file)
    device = comments[0].partition(": ")[2]
    made = {}
    for shared, some in groups(rows).items():
        title = f"{shared}, on {device}"
        eager = [row for row in some if row["mode"] == "eager"]
        measured = [row for row in eager or some if row["status"] == "ok"]
        draw = lengths if len({row["size"] for row in measured}) > 1 else bars
        for name, columns in PANELS.items():
            panels = [c for c in columns if any(row[c[0]] for row in measured)]
            tables = [column_table(some, *pair) for pair in _TABLES[name].items()]
            if name == "Time" and some[0]["kind"] == "mixer":
                tables += [package_table(some), wins(eager)]
            words = f"{stem} {shared.removeprefix(f'{file.stem},')} {name}".lower()
            made["-".join(re.findall(r"[\w.]+", words))] = Section(
                f"{name}: {file.stem}",
                draw(measured, panels, title) if panels else None,
                [table for table in tables if table.rows],
                [*comments, *refusals(some), LIMITS],
            )
    return made


def write(files: Sequence[Path], more: Sequence[Section], out: Path) -> list[Path]:
    """Write the HTML page and its figures to one folder.

    Args:
        files: CSV files of the benchmark.
        more: further sections, appended to the page.
        out: folder, created if necessary.

    Returns:
        The files written; the page comes first.

    Raises:
        ValueError: if a file cannot be read, or if two files would write the same figure.
    """
    made: dict[Path, dict[str, Section]] = {}
    for file in files:
        mine = sections(file)
        for other, named in made.items():
            if same := mine.keys() & named.keys():
                raise ValueError(f"{other} and {file} would both write {min(same)}.png: rename one")
        made[file] = mine
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "index.html"]
    for file, named in made.items():
        for name, section in named.items():
            if section.figure is not None:
                written.append(out / f"{name}.png")
                save(section.figure, written[-1], source=fingerprint(file))
    shown = [section for named in made.values() for section in named.values()]
    write_page(out / "index.html", "Memory and time of token mixers", [*shown, *more])
    return written
