"""Tables, and pages of tables and pictures that need no network."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .atomic import write_whole

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1f2328; }
h2 { margin-top: 3rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding: 1rem 0 0.3rem; }
th, td { padding: 0.35rem 0.8rem; text-align: right; border-bottom: 1px solid #d8dee4;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
img { width: 100%; min-width: 44rem; height: auto; }
code { font-size: 0.85rem; overflow-wrap: anywhere; }
.notes { font-size: 0.9rem; color: #57606a; }
"""


@dataclasses.dataclass
class Table:
    """Rows of cells under headings; the first column names them."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def text(self) -> str:
        """For a terminal."""
        lines = [self.headings, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                (cell.ljust(w) if i == 0 else cell.rjust(w))
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """For the README."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """For a page; what is wider than a phone scrolls."""
        head = "".join(f"<th>{html.escape(h)}</th>" for h in self.headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="wide"><table>{caption}<tr>{head}</tr>{body}</table></div>'


@dataclasses.dataclass
class Section:
    """A heading, a picture, its tables, and in small print how they came about."""

    title: str
    figure: Figure | None = None
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def html(self) -> str:
        title = html.escape(self.title)
        parts = [f"<h2>{title}</h2>"]
        if self.figure is not None:
            image = f'<img alt="{title}" src="{_inline(self.figure)}">'
            parts.append(f'<div class="wide">{image}</div>')
        parts += [table.html() for table in self.tables]
        if self.notes:
            lines = "<br>".join(html.escape(note) for note in self.notes)
            parts.append(f'<p class="notes"><code>{lines}</code></p>')
        return "".join(parts)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """One file, whole or not at all."""
    body = "".join(section.html() for section in sections)
    write_whole(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n",
    )


def _inline(figure: Figure) -> str:
    """A figure as the address of an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
