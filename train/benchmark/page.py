"""Figures of the measurements: PNG files and one self-contained HTML page to explore them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..html import Section, View, write_page
from ..plots import save
from ..provenance import fingerprint
from .errors import error_section
from .estimate import computed_table
from .explore import CHOICES, views
from .fits import fits_section
from .pictures import bars, lengths
from .rows import Row, read_csv, read_rows

PANELS = {
    "Memory": [("kept_mib", "saved for backward, MiB"), ("peak_mib", "peak of a step, MiB")],
    "Time": [("step_ms_p50", "training step, ms"), ("infer_ms_p50", "inference, ms")],
}
# the sections of files that hold no measured rows, by a column that only they have
_SECTIONS = {"error": error_section, "image_mib": fits_section}


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows that can share a figure, keyed by a description of what they share."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        shared = f"{row['kind']}s, {row['dtype']}, batch {row['batch']}"
        found.setdefault(shared, []).append(row)
    return found


def pictures(file: Path, device: str, rows: Sequence[Row]) -> dict[str, Figure | None]:
    """Draw the static figures of a file, by name; None if nothing was measured."""
    made: dict[str, Figure | None] = {}
    for shared, some in groups(rows).items():
        eager = [row for row in some if row["mode"] == "eager"]
        measured = [row for row in eager or some if row["status"] == "ok"]
        draw = lengths if len({row["size"] for row in measured}) > 1 else bars
        for name, columns in PANELS.items():
            panels = [c for c in columns if any(row[c[0]] for row in measured)]
            words = f"{stem_of(file)} {shared.removeprefix(f'{file.stem},')} {name}".lower()
            made["-".join(re.findall(r"[\w.]+", words))] = (
                draw(measured, panels, f"{shared}, on {device}") if panels else None
            )
    return made


def stem_of(file: Path) -> str:
    """Return the first part of the names of a file's figures: its folder and its own name."""
    return f"{file.absolute().parent.name}-{file.stem}"


def choices(
    file: Path, comments: Sequence[str], rows: Sequence[Row], taken: set[str]
) -> list[View]:
    """Build the views of a file, for the interactive part of the page.

    Args:
        file: the file.
        comments: its comment lines.
        rows: its rows.
        taken: descriptions of machine and file that are in use; those of this file are added.
    """
    device, versions = (line.partition(": ")[2] for line in comments[:2])
    torch = [version for version in versions.split(", ") if version.startswith("torch ")]
    machine = ", ".join([device, *torch])
    name = file.stem if f"{machine}/{file.stem}" not in taken else stem_of(file)
    taken.add(f"{machine}/{name}")
    made = []
    for some in groups(rows).values():
        kind = "single layers" if some[0]["kind"] == "mixer" else "whole models"
        made += views(machine, f"{kind}: {name}", some, comments)
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
    drawn: dict[Path, dict[str, Figure | None]] = {}
    shown: list[View] = []
    taken: set[str] = set()
    sections: list[Section] = []
    for file in files:
        comments, found = read_csv(file)
        section = next((make for column, make in _SECTIONS.items() if column in found[0]), None)
        if section is not None:
            try:
                sections.append(section(comments, found))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            mine = {stem_of(file): sections[-1].figure}
        else:
            comments, rows = read_rows(file)
            mine = pictures(file, comments[0].partition(": ")[2], rows)
            shown += choices(file, comments, rows, taken)
            compared = computed_table(rows)
            if compared.rows:
                title = f"Computed and measured memory: {stem_of(file)}"
                sections.append(Section(title, tables=[compared]))
        for other, named in drawn.items():
            if same := mine.keys() & named.keys():
                raise ValueError(f"{other} and {file} would both write {min(same)}.png: rename one")
        drawn[file] = mine
    if shown:
        sections.insert(0, Section("Layers and models", choices=CHOICES, views=shown))
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "index.html"]
    for file, named in drawn.items():
        for name, figure in named.items():
            if figure is not None:
                written.append(out / f"{name}.png")
                save(figure, written[-1], source=fingerprint(file))
    write_page(out / "index.html", "Memory and time of token mixers", [*sections, *more])
    return written
