"""Turn the Sphinx roles of docstrings into links.

:func:`~vision_xformer.create_model` is shown as ``create_model``, with a link if the API page has an
entry of that name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(~?)([\w.]+)`")
_ENTRIES = set(
    re.findall(
        r"^::: vision_xformer\.(\w+)$",
        Path(__file__).with_name("api.md").read_text(encoding="utf-8"),
        re.M,
    )
)


class SphinxRoles(griffe.Extension):
    """Turn the roles of a docstring into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object as it is collected."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_markdown, obj.docstring.value)


def _markdown(match: re.Match[str]) -> str:
    short, path = match.groups()
    name = path.rpartition(".")[2]
    shown = f"`{name if short else path}`"
    return f"[{shown}][vision_xformer.{name}]" if name in _ENTRIES else shown
