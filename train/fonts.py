"""Draw arbitrary names in figures: as plain text, in fonts that have their characters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

PLAIN = {"text.parse_math": False, "text.usetex": False}  # no markup, as names may contain $ or %
_BOXES = "Last Resort"  # a font that has every character, but draws only boxes


@functools.cache
def _characters(file: str) -> frozenset[int]:
    return frozenset(get_font(file).get_charmap())


@functools.cache
def _installed() -> dict[str, frozenset[int]]:
    """Return the characters that all upright fonts of each installed family have."""
    found: dict[str, frozenset[int]] = {}
    for font in fontManager.ttflist:
        if font.style == "normal" and not font.name.startswith(_BOXES):
            characters = _characters(font.fname)
            found[font.name] = found.get(font.name, characters) & characters
    return found


def short(text: str, longest: int) -> str:
    """Shorten a text to at most ``longest`` characters, with an ellipsis."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def plain_text(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Prepare texts for a figure.

    Args:
        texts: any texts.

    Returns:
        Parameters of matplotlib that disable markup and add installed fonts for characters that the
        default font lacks; and the texts, with "?" for characters that no font has. Such a text
        begins with its index, from 0.
    """
    default = [_characters(findfont(FontProperties(weight=w))) for w in ("normal", "bold")]
    missing = {ord(character) for text in texts for character in text} - {ord("\n")}
    missing -= default[0] & default[1]
    families = list(mpl.rcParams["font.family"])
    while missing:
        known = _installed()
        best = max(known, key=lambda name: len(missing & known[name]))
        if not missing & known[best]:
            break
        families.append(best)
        missing -= known[best]
    shown = [text.translate(dict.fromkeys(missing, "?")) for text in texts]
    shown = [
        drawn if drawn == text else f"{i}: {drawn}"
        for i, (text, drawn) in enumerate(zip(texts, shown, strict=True))
    ]
    return {**PLAIN, "font.family": families}, shown
