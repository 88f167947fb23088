"""Streamed Hugging Face datasets: a few files at a time are copied to this machine."""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..text import reason
from .cache import open_copy, remembered
from .images import Item, ShardError

AT_ONCE = 64  # rows in memory while a file is copied
_OFFSET = struct.Struct("<q")


@dataclasses.dataclass(frozen=True, eq=False)
class StreamShard:
    """One file of a stream; its copy holds the offsets of all images, then the images.

    Args:
        stream: the rows of the file, a ``datasets.IterableDataset``.
        image: column of the encoded images.
        key: what the content of the file depends on.
        name: name of the file, for errors.
        count: number of images.
    """

    stream: Any
    image: str
    key: str
    name: str
    count: int

    def read(self, index: int) -> IO[bytes]:
        """Return the bytes of an image.

        Raises:
            ValueError: for a row without an image.
            ShardError: if the file cannot be fetched.
        """
        with open_copy(f"{self.key} {self.image}", self._copy) as file:
            file.seek(index * _OFFSET.size)
            start, end = struct.unpack("<2q", file.read(2 * _OFFSET.size))
            if start == end:
                raise ValueError("the dataset has no bytes of this image")
            file.seek(start)
            return io.BytesIO(file.read(end - start))

    def _copy(self, path: Path) -> None:
        offsets = [(self.count + 1) * _OFFSET.size]
        with path.open("wb") as file:
            file.seek(offsets[0])
            try:
                # Unlike plain iteration, batches are not divided among the workers of a DataLoader.
                for rows in self.stream.iter(AT_ONCE):
                    for row in rows[self.image]:
                        data = (row and row["bytes"]) or b""
                        offsets.append(offsets[-1] + file.write(data))
            except Exception as error:  # those of the network and of the file format
                raise ShardError(f"{self.name} cannot be fetched: {reason(error)}") from error
            if len(offsets) != self.count + 1:
                raise ShardError(
                    f"{self.name} has {len(offsets) - 1} images, but had {self.count} labels when "
                    "these were read"
                )
            file.seek(0)
            file.write(struct.pack(f"<{len(offsets)}q", *offsets))


class Streams:
    """The splits of a streamed dataset.

    Args:
        library: the package ``datasets``.
        root: a folder, or a name on the Hub.
        config: name of the configuration, if there are several.

    Raises:
        ValueError: if there is no such dataset, or if its columns are not known.
    """

    def __init__(self, library: Any, root: str, config: str | int | None) -> None:
        self.library, self.name = library, None if config is None else str(config)
        folder = Path(root).expanduser()
        self.root = str(folder.resolve()) if folder.is_dir() else root
        self.builder = self._builder()
        self.splits: dict[str, Any] = dict(self.builder.as_streaming_dataset())
        if any(split.features is None for split in self.splits.values()):
            raise ValueError(f"{root} does not state the types of its columns: save it as Parquet")

    def _builder(self, **options: Any) -> Any:
        try:
            return self.library.load_dataset_builder(self.root, self.name, **options)
        except Exception as error:  # those of the network, too
            raise ValueError(
                f"{self.root} cannot be streamed as a Hugging Face dataset: {reason(error)}"
            ) from error

    def read(self, stream: Any, image: str, label: str) -> tuple[list[Item], list[Any]]:
        """Return the images and labels of a split; the labels are read once and cached.

        Raises:
            ValueError: for a row without a label, or a file that cannot be read.
        """
        split = next(name for name, found in self.splits.items() if found is stream)
        encoded = type(stream.features[image])(decode=False)  # our reader decodes all images
        images = stream.select_columns([image]).cast_column(image, encoded)
        items: list[Item] = []
        values: list[Any] = []
        files = tqdm(range(stream.num_shards), desc=f"labels of {split}", unit="file",
                     disable=stream.num_shards < 10 or None)  # fmt: skip
        labels = functools.cache(functools.partial(self._label_column, split, label))
        for number in files:
            file = f"{split} file {number}"
            key = f"{self.root} {self.builder.hash} {file}"  # a hash of what the files contain
            compute = functools.partial(_labels, labels, label, number, f"{file} of {self.root}")
            found = remembered(f"{key} {label}", compute)["labels"]
            rows = images.shard(stream.num_shards, number)
            read = StreamShard(rows, image, key, f"{file} of {self.root}", len(found)).read
            items += [Item(read, i, f"image {i} of {file}", number) for i in range(len(found))]
            values += found
        return items, values

    def _label_column(self, split: str, label: str) -> Any:
        """Return a stream of the labels; from Parquet files, no other column is read."""
        columns = {"columns": [label]} if self.builder.name == "parquet" else {}
        return self._builder(**columns).as_streaming_dataset(split).select_columns([label])


def _labels(column: Callable[[], Any], label: str, number: int, name: str) -> dict[str, Any]:
    """Read the labels of a file.

    Raises:
        ValueError: for a row without a label, or a file that cannot be read.
    """
    stream = column()
    found: list[Any] = []
    try:
        for rows in stream.shard(stream.num_shards, number).iter(AT_ONCE):
            found += rows[label]
    except Exception as error:  # those of the network and of the file format
        raise ValueError(f"{name} cannot be read: {reason(error)}") from error
    check_labels(found, label, name)
    return {"labels": found}


def check_labels(values: Sequence[Any], label: str, name: str) -> None:
    """Raise a ValueError for a row without a label: None or not a number."""
    for row, value in enumerate(values):
        if value is None or value != value:
            raise ValueError(f"row {row} of {name} has no {label}")
