"""Tables and pictures of what was measured: PNG files and one page that needs no network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from ..html import Section, write_page
from ..plots import save
from .errors import error_section
from .pictures import bars, lengths, wins
from .rows import Row, column_table, package_table, read_csv, read_rows, refusals

PANELS = {
    "Memory": [("kept_mib", "kept for backward, MiB"), ("peak_mib", "peak of a step, MiB")],
    "Time": [("step_ms_p50", "training step, ms"), ("infer_ms_p50", "inference, ms")],
}
_TABLES = {
    "Memory": {"kept_mib": "kept for backward, MiB", "peak_mib": "peak of a training step, MiB",
               "reserved_mib": "reserved by the allocator in all, MiB",
               "device_mib": "held of the GPU, as its driver says, MiB"},
    "Time": {"step_ms_p50": "training step, median ms", "infer_ms_p50": "inference, median ms",
             "images_per_second": "images/s in training"},
}  # fmt: skip
LIMITS = (
    "~ marks a time whose p20 and p80 are more than 15 % of the median apart, and a ratio with "
    "such a time. A size without a figure was not measured. Weights are random: what a mixer costs "
    "here does not depend on them."
)


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that can be drawn together, under what they have in common."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        shared = f"{row['kind']}s, {row['dtype']}, batch {row['batch']}"
        found.setdefault(shared, []).append(row)
    return found


def sections(file: Path) -> dict[str, Section]:
    """Those of one file, by a name for the picture."""
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


def fingerprint(file: Path) -> str:
    """Of what a picture was drawn from; the picture carries it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def write(files: Sequence[Path], more: Sequence[Section], out: Path) -> list[Path]:
    """The page and its pictures, in one folder; returns the files.

    A ValueError says which two files would have pictures of one name.
    """
    made: dict[Path, dict[str, Section]] = {}
    for file in files:
        mine = sections(file)
        for other, named in made.items():
            if same := mine.keys() & named.keys():
                raise ValueError(f"{other} and {file} would both draw {min(same)}.png: rename one")
        made[file] = mine
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "index.html"]
    for file, named in made.items():
        for name, section in named.items():
            if section.figure is not None:
                written.append(out / f"{name}.png")
                save(section.figure, written[-1], source=fingerprint(file))
    shown = [section for named in made.values() for section in named.values()]
    write_page(out / "index.html", "What attention costs", [*shown, *more])
    return written
