"""Files cached on each machine: indices of shards, and copies of remote shards."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from ..atomic import read_json, replace
from .images import ShardError

KEPT = 16 * 2**30  # bytes of copies; the oldest are removed


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/vision_xformer``, by default in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "vision_xformer"


def remembered(key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a JSON value that is computed once and then read from its file.

    Args:
        key: what the value depends on.
        compute: called if there is no file yet, or a damaged one; if it raises an error, none is
            written.
    """
    path = _path("index", key)

    def write(part: Path) -> None:
        part.write_text(json.dumps({"key": key, "value": compute()}), encoding="utf-8")

    found = _value(path, key)
    if found is None:
        _make(path, write, lambda path: _value(path, key) is not None)
        found = _value(path, key)
        assert found is not None
    return found


def _value(path: Path, key: str) -> dict[str, Any] | None:
    """Return the value in a file of :func:`remembered`; None without a file or if it is damaged."""
    try:
        found = read_json(path, dict)
    except (FileNotFoundError, ValueError):
        return None
    return found.get("value") if found.get("key") == key else None


def open_copy(key: str, write: Callable[[Path], Any]) -> IO[bytes]:
    """Open the copy of a remote file, which is made if it is missing.

    Args:
        key: what the copy depends on.
        write: makes the copy at a path.

    Raises:
        ShardError: if it cannot be made.
    """
    path = _path("shards", key)
    while True:
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it
            return path.open("rb")
        if _make(path, write):
            _remove_oldest(path.parent)


def _path(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"


def _make(
    path: Path, write: Callable[[Path], Any], is_there: Callable[[Path], bool] = Path.is_file
) -> bool:
    """Write a file unless there is one; return whether it was written by this process.

    Raises:
        ShardError: if it cannot be written; ``write`` may raise one, too.
    """
    if is_there(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of several processes, one writes
        if is_there(path):
            return False
        try:
            replace(path, write)
        except OSError as error:
            if isinstance(error.__cause__, ShardError):
                raise error.__cause__ from None
            raise ShardError(str(error)) from error
        return True


def _remove_oldest(folder: Path) -> None:
    """Remove the oldest copies, including incomplete ones, beyond ``KEPT`` bytes."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removes some, too
            if path.suffix != ".lock":
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    found.sort(reverse=True)
    sizes = itertools.accumulate(size for _, size, _ in found)
    for (_, _, path), total in list(zip(found, sizes, strict=True))[1:]:
        if total > KEPT:
            path.unlink(missing_ok=True)
