"""Find image files in folders, and count the files that are left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .reading import IMAGE_ENDINGS

# names of the sets in folders and files, in upper or lower case
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SHOWN = 10  # names that are printed of a longer list


def shorten(names: list[str], separator: str = ", ") -> str:
    """Join the first ten names, and add the number of the others."""
    rest = len(names) - SHOWN
    return separator.join(names[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def visible(name: str) -> bool:
    """Return whether a file or folder is neither hidden nor metadata of a macOS archive."""
    return not name.startswith(".") and name != "__MACOSX"


def is_image(name: str) -> bool:
    """Return whether a file has the extension of an image, in upper or lower case."""
    return _ending(name) in IMAGE_ENDINGS


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def list_images(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; hidden ones are skipped.

    Args:
        folder: where to look; links are followed.
        left_out: is updated with counts of the other files by extension or reason.
    """
    found: list[Path] = []
    counts: Counter[str] = Counter() if left_out is None else left_out
    for entry in walk(folder):
        if not is_image(entry.name):
            counts[_ending(entry.name) or "no extension"] += 1
        elif entry.is_file():
            found.append(Path(entry.path))
        else:
            counts["dangling links" if entry.is_symlink() else "not plain files"] += 1
    return sorted(found)


def walk(
    folder: Path | str, seen: set[tuple[int, int]] | None = None
) -> Iterator[os.DirEntry[str]]:
    """Yield all entries in a folder and its subfolders that are not folders; links are followed.

    Args:
        folder: where to look; hidden files and folders are skipped.
        seen: folders that were visited: each is visited once, even with links.
    """
    seen = set() if seen is None else seen
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if visible(entry.name)]
    for entry in sorted(shown, key=lambda entry: entry.name):
        if entry.is_dir():
            yield from walk(entry.path, seen)
        else:
            yield entry


def left_out_note(root: Path, left_out: Counter[str]) -> list[str]:
    """Return a line about the files that were left out, if there are any."""
    if not left_out:
        return []
    reasons = [f"{reason} {count:,}" for reason, count in left_out.most_common()]
    files = "file is" if left_out.total() == 1 else "files are"
    return [f"{left_out.total():,} {files} left out of {root}: {shorten(reasons)}"]
