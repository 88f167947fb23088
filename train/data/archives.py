"""Unpack downloaded archives, and check that tar files are complete."""

from __future__ import annotations

import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..text import reason

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
ENDINGS = (".zip", ".tar", *COMPRESSED)  # of archives, in lower case
_ERRORS = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError,
    RuntimeError,  # for a password or an unknown compression
)  # fmt: skip


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar file into the folder ``target``, which appears only when complete.

    Raises:
        ValueError: if the archive is truncated or damaged, or contains a link or a path outside
            the target.
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
                check_end(archive, file)
                assert file.fileobj is not None
                while file.fileobj.read(2**20):  # a checksum is behind the compressed data
                    pass
        part.rename(target)
    except _ERRORS as error:
        raise ValueError(f"{archive} cannot be unpacked: {reason(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_end(archive: Path | str, tar: tarfile.TarFile) -> None:
    """Check that a tar file has its mark of the end, a block of zeros, after its last member.

    ``tarfile`` takes a damaged header for the end.

    Args:
        archive: name of the tar file, for errors.
        tar: the file, whose members have all been read.

    Raises:
        ValueError: if there is no such block.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"{archive} is truncated")
    if any(block):
        raise ValueError(f"{archive} is damaged at byte {tar.offset:,}")


def check_inside(archive: Path, names: Sequence[str]) -> None:
    """Raise a ValueError for a path that leads out of the target folder."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{archive} has the path {name}, out of its folder")
