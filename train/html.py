"""Tables, and self-contained HTML pages of tables and figures."""

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
    """A table of text cells.

    Args:
        headings: heading of each column.
        rows: cells of each row; the first cell names the row.
        caption: caption, empty for none.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def text(self) -> str:
        """Format the table for a terminal, with aligned columns and without its caption."""
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
        """Format the table as Markdown, without its caption."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """Format the table as HTML that scrolls on narrow screens."""
        head = "".join(f"<th>{html.escape(h)}</th>" for h in self.headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="wide"><table>{caption}<tr>{head}</tr>{body}</table></div>'


@dataclasses.dataclass
class Section:
    """A section of a page.

    Args:
        title: heading of the section.
        figure: figure below the heading.
        tables: tables below the figure.
        notes: lines in small print that describe how the results were obtained.
    """

    title: str
    figure: Figure | None = None
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def html(self) -> str:
        """Format the section as HTML, with its figure embedded."""
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
    """Write sections to one self-contained HTML file, atomically.

    Args:
        path: file to write.
        title: title of the page.
        sections: sections, in order.
    """
    body = "".join(section.html() for section in sections)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )
    # file names that are not valid UTF-8 cannot be encoded
    write_whole(path, page.encode("utf-8", "backslashreplace").decode())


def _inline(figure: Figure) -> str:
    """Encode a figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
