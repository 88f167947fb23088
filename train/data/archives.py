"""Unpack downloaded archives."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar file into the folder ``target``, which appears only when complete.

    Raises:
        ValueError: if the archive is truncated, or contains a link or a path outside the target.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                check_inside(archive, file.namelist())
                file.extractall(part)
        else:
            with tarfile.open(archive) as file:
                for member in file:
                    if not (member.isfile() or member.isdir()):
                        raise ValueError(f"{archive} has {member.name}, no plain file or folder")
                check_inside(archive, file.getnames())
                # The filter drops owners and modes; Python before 3.11.4 may not have it.
                more: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                file.extractall(part, **more)
        part.rename(target)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_inside(archive: Path, names: Sequence[str]) -> None:
    """Raise a ValueError for a path that leads out of the target folder."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{archive} has the path {name}, out of its folder")
