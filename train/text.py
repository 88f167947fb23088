"""Texts for the terminal: names that users chose, and the reasons of errors, on one line."""

from __future__ import annotations

import re
from pathlib import Path

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks among them


def escaped(text: str) -> str:
    r"""Escape line breaks and other control characters, which names of files may contain.

    >>> escaped("two\nlines")
    'two\\nlines'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def reason(error: Exception) -> str:
    """The message of an exception on one line; its type if it has no message.

    That of the operating system is without its number and the name of the file.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def error_text(error: Exception) -> str:
    """The sentence to print for an exception: our own message, or the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return escaped(f"{error.filename}: {reason(error)}")
    return escaped(str(error).strip() or type(error).__name__)


def shell_path(path: Path) -> str:
    """The path as an argument of a command, which must not look like an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
