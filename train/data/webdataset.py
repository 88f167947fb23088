"""WebDataset shards: tar files of images and labels, on this machine or at URLs."""

from __future__ import annotations

import dataclasses
import glob
import io
import itertools
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..config import DataConfig
from ..text import reason
from .archives import COMPRESSED, check_end, check_inside
from .cache import cache_folder, open_copy, remembered
from .files import SPLIT_NAMES, is_image, shorten, walk
from .images import Item, ShardError, item_channels
from .registry import Source, register

URLS = ("http://", "https://", "s3://", "gs://", "hf://")
_INTEGER = re.compile("0|-?[1-9][0-9]{0,17}")  # as Python prints it


@dataclasses.dataclass(frozen=True, eq=False)
class TarShard:
    """A shard, whose images are read by their positions in the tar file.

    Args:
        path: path or URL of the tar file.
        stamp: changes if the tar file does.
        spans: first byte and number of bytes (images, 2) of each image.
    """

    path: str
    stamp: str
    spans: npt.NDArray[np.int64]

    def read(self, index: int) -> IO[bytes]:
        """Return the bytes of an image.

        Raises:
            ShardError: if the shard has changed or cannot be fetched.
        """
        start, size = self.spans[index].tolist()
        with _open(self.path) as file:
            if _stamp(self.path, file) != self.stamp:
                raise ShardError(
                    f"{self.path} has changed since it was indexed; to index all shards again, "
                    f"remove {cache_folder()}"
                )
            file.seek(start)
            return io.BytesIO(file.read(size))


class Index(NamedTuple):
    """A shard, and the name and class of each of its images."""

    shard: TarShard
    names: list[str]
    classes: list[str]


@register("webdataset")
def read_webdataset(config: DataConfig) -> Source:
    """Read the tar files below ``root``, or those that a pattern of paths or URLs names.

    A sample is one image ``KEY.jpg`` (or of another format) next to its label ``KEY.cls``, the
    index of a class or its name: labels are indices if all of the training set are integers, and at
    least half of those from 0 to the largest occur. A file with train, val (or valid, or
    validation) or test in its name, or in a folder of that name, belongs to that set, any other to
    the training set. A validation set is the test set if there is no test set. The shards are
    indexed once.

    Raises:
        ValueError: if ``webdataset`` is not installed, if a shard is missing, truncated, damaged or
            compressed, or if a sample has no label or not exactly one image; it names the shard.
    """
    found = _find_shards(config.root)
    count = sum(map(len, found.values()))
    with tqdm(total=count, desc="indexing", unit="shard", disable=count < 10 or None) as progress:
        indices = {part: [_indexed(path, progress) for path in found[part]] for part in found}
    if "test" not in indices and "val" in indices:
        indices["test"] = indices.pop("val")
    numbers = _number_classes(indices["train"])
    samples = {part: _samples(shards, numbers) for part, shards in indices.items()}
    paths = [index.shard.path for index in indices["train"]]
    local = {number for number, path in enumerate(paths) if not path.startswith(URLS)}
    channels, notes = item_channels(samples["train"], local)
    return Source(
        samples["train"],
        list(numbers),
        test=samples.get("test", []),
        val=samples.get("val", []),
        channels=channels,
        notes=notes,
    )


def _find_shards(root: str) -> dict[str, list[str]]:
    """Return the paths or URLs of the shards of "train", "val" and "test", each shard once."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        files = sorted(Path(entry.path) for entry in walk(folder))
        for file in files:
            if file.name.lower().endswith(COMPRESSED):
                raise ValueError(f"{file} is compressed: decompress it, or move it elsewhere")
        shards = [file for file in files if file.name.lower().endswith(".tar")]
        named = {str(file): file.relative_to(folder).parts for file in shards}
    else:
        named = {path: Path(path).parts for path in _expand(root)}
    if not named:
        raise ValueError(f"data.root {root} has no shards, files *.tar")
    parts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path, names in named.items():
        real = path if path.startswith(URLS) else os.path.realpath(path)
        if real not in seen:
            parts.setdefault(_set_of(names), []).append(path)
        seen.add(real)
    if "train" not in parts:
        raise ValueError(f"data.root {root} has shards of {', '.join(parts)}, but none of train")
    return parts


def _set_of(names: Sequence[str]) -> str:
    """Return the set that is a word in the name of a file, or else the name of its folder."""
    words = [*re.findall("[a-z]+", names[-1].lower()), *map(str.lower, names[-2:-1])]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def _expand(pattern: str) -> list[str]:
    """Expand ``{000..146}``, ``*`` and several patterns separated by ``::``."""
    paths: list[str] = []
    for path in _library().shardlists.expand_urls(pattern):
        if path.startswith(URLS):
            paths.append(path)
        elif re.match(r"\w{2,}:", path):
            raise ValueError(f"data.root {path} must be a path or begin with {', '.join(URLS)}")
        else:
            files = sorted(glob.glob(os.path.expanduser(path)))
            if not files:
                raise ValueError(f"data.root: there is no shard {path}")
            paths += files
    return list(dict.fromkeys(paths))


def _library() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ValueError(
            "data.name webdataset needs the package webdataset: pip install webdataset"
        ) from error
    return webdataset


def _open(path: str) -> IO[bytes]:
    """Open a shard; one at a URL is copied to this machine first."""
    if not path.startswith(URLS):
        return open(path, "rb")

    def fetch(copy: Path) -> None:
        try:
            with _library().gopen(path) as stream, copy.open("wb") as file:
                shutil.copyfileobj(stream, file, 2**20)
        except Exception as error:  # those of the tools that webdataset calls
            raise ShardError(f"{path} cannot be fetched: {reason(error)}") from error

    return open_copy(path, fetch)


def _indexed(path: str, progress: tqdm[Any]) -> Index:
    """Return the index of a shard, which is computed once."""
    key = path
    if not path.startswith(URLS):
        with _open(path) as file:
            key = f"{os.path.abspath(path)} {_stamp(path, file)}"
    found = remembered(f"webdataset {key}", lambda: _index(path))
    progress.update()
    rows: list[tuple[str, int, int, str]] = found["samples"]
    spans = np.array([span for _, *span, _ in rows], np.int64).reshape(-1, 2)
    shard = TarShard(path, found["stamp"], spans)
    return Index(shard, [row[0] for row in rows], [sys.intern(row[3]) for row in rows])


def _stamp(path: str, file: IO[bytes]) -> str:
    """Return the size of a shard and, unless it is a copy, when it was last changed."""
    status = os.fstat(file.fileno())
    return (
        str(status.st_size) if path.startswith(URLS) else f"{status.st_size} {status.st_mtime_ns}"
    )


def _index(path: str) -> dict[str, Any]:
    """Find the images and labels of a shard.

    Raises:
        ValueError: if it is truncated, damaged, compressed or not a tar file, or if a sample is
            incomplete.
    """
    try:
        with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
            check_end(path, tar)
            groups = itertools.groupby(_keyed(path, members), key=lambda found: found[0])
            samples = [_sample(path, tar, key, [m for _, m in group]) for key, group in groups]
            stamp = _stamp(path, file)
    except ShardError:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar file: {reason(error)}"
        ) from error
    return {"stamp": stamp, "samples": samples}


def _keyed(path: str, members: Sequence[tarfile.TarInfo]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the files of a shard with their key: the path up to the first dot of the file name.

    Like webdataset, it skips names without a key or an ending, and metadata (``__NAME__``).
    """
    check_inside(Path(path), [member.name for member in members])
    for member in members:
        found = re.match(r"(?!__[^/]*__(?:$|/))((?:.*/)?[^./]+)\.", member.name)
        if found and member.isreg() and not member.issparse():
            yield found[1], member


def _sample(
    path: str, tar: tarfile.TarFile, key: str, members: Sequence[tarfile.TarInfo]
) -> tuple[str, int, int, str]:
    """Return the name, position and bytes of the image of a sample, and its label."""
    images = [member for member in members if is_image(member.name)]
    if len(images) != 1:
        raise ValueError(f"{path}: sample {key} must have 1 image, has {len(images)}")
    label = ""
    for member in members:
        file = tar.extractfile(member) if member.name.endswith(".cls") else None
        if file is not None:
            label = file.read().decode("utf-8", "replace").strip()
    if not label:
        raise ValueError(f"{path}: sample {key} has no label, a file {key}.cls")
    return images[0].name, images[0].offset_data, images[0].size, label


def _number_classes(indices: Sequence[Index]) -> dict[str, int]:
    """Return the classes of the training set and their numbers.

    They are all indices up to the largest if at least half of these occur; otherwise the labels are
    names, which are sorted: as integers if all of them are, like years.
    """
    classes = {name for index in indices for name in index.classes}
    if not classes:
        paths = [index.shard.path for index in indices]
        raise ValueError(f"{shorten(paths)}: there are no images")
    if not all(map(_INTEGER.fullmatch, classes)):  # "007" is a name
        names = sorted(classes)
    else:
        names = sorted(classes, key=int)
        count = int(names[-1]) + 1
        if int(names[0]) >= 0 and 2 * len(names) >= count:
            names = list(map(str, range(count)))
    return {name: i for i, name in enumerate(names)}


def _samples(indices: Sequence[Index], numbers: dict[str, int]) -> list[tuple[Item, int]]:
    """Return the images of all shards with the numbers of their classes."""
    samples: list[tuple[Item, int]] = []
    for number, (shard, names, classes) in enumerate(indices):
        read, file = shard.read, PurePosixPath(shard.path).name
        for i, (name, found) in enumerate(zip(names, classes, strict=True)):
            if found not in numbers:
                raise ValueError(
                    f"{shard.path}: {name} has the class {found}, which no training image has"
                )
            samples.append((Item(read, i, f"{file}/{name}", number), numbers[found]))
    return samples
