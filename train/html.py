"""Tables, and self-contained HTML pages of tables and figures.

Tables sort by a click on a heading (``page.js``). A section is static, or has views to choose from,
each with an interactive figure.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from vision_xformer.summary import text_table

from .atomic import write_whole
from .text import escaped

if TYPE_CHECKING:
    from PIL.Image import Image
    from plotly.graph_objects import Figure as Interactive

_STYLE, _SCRIPT = (Path(__file__).with_name(f"page.{kind}") for kind in ("css", "js"))


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
        lines = [[escaped(cell) for cell in line] for line in (self.headings, *self.rows)]
        return text_table(lines, right=range(1, len(self.headings)))

    def markdown(self) -> str:
        """Format the table as Markdown, without its caption."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def html(self) -> str:
        """Format the table as HTML that sorts by its columns and scrolls on narrow screens."""
        head = "".join(
            f'<th><button type="button">{html.escape(h)}</button></th>' for h in self.headings
        )
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        return f'<div class="wide"><table>{caption}{rows}</table></div>'


@dataclasses.dataclass
class Strip:
    """A row of images with captions, which wraps on narrow screens.

    Args:
        heading: line above the row.
        pictures: images in order, by caption.
    """

    heading: str
    pictures: Mapping[str, Image]

    def html(self) -> str:
        """Format the row as HTML, with its images embedded."""
        parts = [f"<p>{html.escape(self.heading)}</p>"]
        for caption, picture in self.pictures.items():
            text, buffer = html.escape(caption), io.BytesIO()
            picture.save(buffer, format="JPEG", quality=90)
            source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            image = f'<img alt="{text}" src="{source}">'
            parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
        return f'<div class="strip">{"".join(parts)}</div>'


@dataclasses.dataclass
class View:
    """What a section shows for one combination of choices.

    Args:
        choice: one value for each choice of the section; None is shown with all of them.
        figure: interactive figure. A trace whose ``meta`` names a ``curve`` and its ``group`` gets
            a button that switches it on and off, with all other traces of this curve; ``names`` in
            the ``meta`` of the layout writes their names at their ends.
        tables: tables below the figure.
        notes: lines in small print.
    """

    choice: Sequence[str | None]
    figure: Interactive | None = None
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def html(self) -> str:
        """Format the view as HTML; its figure is data that the script of the page draws."""
        parts = [table.html() for table in self.tables]
        if self.notes:
            parts.append(_notes(self.notes))
        if self.figure is not None:
            # to_json() escapes "<", so that no name ends the element
            data = self.figure.to_json()
            parts.append(f'<script type="application/json">{data}</script>')
        return f'<div class="view" data-choice="{_attribute(self.choice)}">{"".join(parts)}</div>'


@dataclasses.dataclass
class Section:
    """A section of a page.

    Args:
        title: heading of the section.
        figure: figure below the heading.
        tables: tables below the figure.
        notes: lines in small print that describe how the results were obtained.
        choices: names of the choices between the views, in order.
        views: what to show for each combination; at least one must be without None.
        strips: rows of images below the tables.
    """

    title: str
    figure: Figure | None = None
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    choices: Sequence[str] = ()
    views: Sequence[View] = ()
    strips: Sequence[Strip] = ()

    def html(self) -> str:
        """Format the section as HTML, with its figures embedded."""
        title = html.escape(self.title)
        parts = [f"<h2>{title}</h2>"]
        if self.figure is not None:
            image = f'<img alt="{title}" src="{_inline(self.figure)}">'
            parts.append(f'<div class="wide">{image}</div>')
        parts += [table.html() for table in self.tables]
        parts += [strip.html() for strip in self.strips]
        if self.notes:
            parts.append(_notes(self.notes))
        if self.views:
            parts += [
                f'<section data-choices="{_attribute(self.choices)}"><div class="choices"></div>',
                '<div class="curves"></div><div class="plot"></div>',
                *(view.html() for view in self.views),
                "</section>",
            ]
        return "".join(parts)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write sections to one self-contained HTML file, atomically.

    Args:
        path: file to write.
        title: title of the page.
        sections: sections, in order.
    """
    body = "".join(section.html() for section in sections)
    if any(view.figure is not None for section in sections for view in section.views):
        body += f'<script type="text/plain" id="plotly">{_plotly()}</script>'
    style, script = (file.read_text(encoding="utf-8") for file in (_STYLE, _SCRIPT))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style>"
        f"<h1>{html.escape(title)}</h1>{body}<script>{script}</script></html>\n"
    )
    # file names that are not valid UTF-8 cannot be encoded
    write_whole(path, page.encode("utf-8", "backslashreplace").decode())


def _notes(lines: Sequence[str]) -> str:
    """Format lines in small print."""
    return f'<p class="notes"><code>{"<br>".join(map(html.escape, lines))}</code></p>'


def _attribute(values: Sequence[str | None]) -> str:
    """Encode values as an attribute that holds JSON."""
    return html.escape(json.dumps(list(values)))


def _plotly() -> str:
    """Encode the library that draws interactive figures; compressed, it is 2 MB instead of 5."""
    from plotly.offline import get_plotlyjs  # the report of runs does without it

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _inline(figure: Figure) -> str:
    """Encode a figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
