"""The lock of a run's folder: one process at a time trains a run."""

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

LOCK, OWNER = ".lock", ".owner.json"


@contextlib.contextmanager
def hold(folder: Path, main: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing.

    Of the processes of one run, the main one has the lock, and this does nothing in the others.

    The operating system releases the lock of a process that ends, however it ends. The process on
    another host that left its name may be alive although its lock is not seen here: some network
    file systems keep locks to themselves.

    Raises:
        ValueError: if another process holds the lock, or a process of another host may; it names
            the process.
    """
    if not main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
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
    """The host of the process that a file names, and the process in words."""
    try:
        owner = read_json(path, dict)
    except FileNotFoundError:
        return None, "another process"
    host = str(owner.get("host"))
    return host, f"process {owner.get('process')} on {host}, since {owner.get('since')}"
