"""Docstrings refer to code as Sphinx does, :func:`~vision_xformer.create_model`; the site shows
``create_model``, with a link where it has an entry of that name."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`(~?)([\w.]+)`")


class SphinxRoles(griffe.Extension):
    """Turn the roles of a docstring into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_markdown, obj.docstring.value)


def _markdown(match: re.Match[str]) -> str:
    short, path = match.groups()
    name = path.rpartition(".")[2] if short else path
    public = re.fullmatch(r"(?:vision_xformer\.)?(\w+)", path)
    if public and path.startswith("vision_xformer."):
        return f"[`{name}`][{path}]"
    return f"`{name}`"
