"""Equations: blocks marked ``math`` become MathML, which browsers show without a script or font.

GitHub shows the same blocks.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return _BLOCK.sub(_mathml, markdown)


def _mathml(match: re.Match[str]) -> str:
    lines = (
        convert(line, display="block") for line in match[1].strip().splitlines()
    )
    return f'<div class="equation">{"".join(lines)}</div>'
