"""Lock the folder of a run, so that only one process at a time trains it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import read_json, write_whole
from .text import reason

LOCK, OWNER = ".lock", ".owner.json"


@contextlib.contextmanager
def hold(folder: Path, main: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it is missing.

    The operating system releases the lock when the process ends, however it ends. Some network file
    systems do not share locks between hosts, so a folder that a process on another host has not
    released counts as locked.

    Args:
        folder: to lock.
        main: whether this is the main process of the run; the others do not lock.

    Raises:
        ValueError: if another process holds the lock, or one on another host may hold it; it names
            the process.
    """
    if not main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be created: {reason(error)}") from error
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_owner(owner)[1]}: wait until it ends, or stop it"
        ) from None
    try:
        host, process = _owner(owner)
        if host not in (None, socket.gethostname()):
            raise ValueError(
                f"{folder} is in use by {process}; if that process has ended, remove {owner}"
            )
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        named = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        write_whole(owner, json.dumps(named) + "\n")
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)
    finally:
        lock.release()


def _owner(path: Path) -> tuple[str | None, str]:
    """Return the host of the process that a file names, and the process in words."""
    try:
        owner = read_json(path, dict)
    except FileNotFoundError:
        return None, "another process"
    host = str(owner.get("host"))
    return host, f"process {owner.get('process')} on {host}, since {owner.get('since')}"
