"""Sets of labeled images, kept in memory or read when they are needed."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from ..signals import held_back
from .reading import (
    GRAYSCALE_MODES,
    Encoded,
    Reading,
    check_header,
    image_error,
    image_mode,
    read_image,
)

MODE_SAMPLES = 64  # images whose modes decide whether a dataset is grayscale
AT_ONCE = 1024  # images queued for the threads
SKIP_HINT = "--data.skip_broken true skips such images"
R = TypeVar("R")


class ShardError(OSError):
    """Raised for a shard that cannot be fetched: its images are unavailable, not broken."""


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """An image of a dataset that is read when it is needed.

    Args:
        read: maps an index to an image, its path or its encoded bytes.
        index: index of this image.
        name: name of this image, for errors; by default its index.
        shard: number of the shard that contains this image, or None.
    """

    read: Callable[[int], Encoded]
    index: int
    name: str = ""
    shard: int | None = None

    def __str__(self) -> str:
        return self.name or f"image {self.index} of the dataset"


# uint8 (C, H, W), the path of a file or an item of a dataset; and the label
Sample = tuple[Tensor | Path | Item, int]
Broken = dict[Tensor | Path | Item, ValueError]  # images that cannot be read, and why


class Images(Dataset[tuple[Tensor, int]]):
    """Images of one size, uint8 of shape (C, S, S), and their labels.

    Images are decoded once if :meth:`keep` is called, otherwise each time they are accessed.

    Args:
        samples: images with their labels.
        size: height and width S in pixels.
        reading: how files become pixels.
    """

    def __init__(
        self, samples: Sequence[Sample], size: int, reading: Reading | None = None
    ) -> None:
        self.samples, self.size, self.reading = samples, size, reading or Reading()
        self.labels = torch.tensor([label for _, label in samples])
        shards = [shard for image, _ in samples if (shard := shard_of(image)) is not None]
        self.shards = torch.tensor(shards) if shards else None  # read one after another
        self.pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        return decode(image, self.size, self.reading), label

    def keep(self, device: torch.device, progress: tqdm[Any]) -> Broken:
        """Decode all images and keep them on the device.

        Returns:
            Images that cannot be read; if there are any, none are kept.
        """
        pixels: Tensor | None = None
        broken: Broken = {}
        for i, image in enumerate(self._each(self._decoded)):
            if isinstance(image, ValueError):
                broken[self.samples[i][0]] = image
            else:
                if pixels is None:
                    pixels = image.new_empty(len(self), *image.shape)
                pixels[i] = image
            progress.update()
        if pixels is not None and not broken:
            self.pixels, self.labels = pixels.to(device), self.labels.to(device)
        return broken

    def find_broken(self, progress: tqdm[Any], fully: bool) -> Broken:
        """Return the images that cannot be read.

        Args:
            progress: a bar that counts images.
            fully: decode all images. Otherwise only the headers of files are read, which is faster
                but does not find all broken images.
        """
        broken: Broken = {}
        checked = self._each(self._decoded if fully else self._opened)
        for (image, _), found in zip(self.samples, checked, strict=True):
            if isinstance(found, ValueError):
                broken[image] = found
            progress.update()
        return broken

    def _each(self, function: Callable[[Sample], R]) -> Iterator[R]:
        """Apply a function to all samples in threads: reading and decoding release the GIL."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self), AT_ONCE):
                yield from pool.map(function, self.samples[start : start + AT_ONCE])

    def _decoded(self, sample: Sample) -> Tensor | ValueError:
        try:
            return decode(sample[0], self.size, self.reading)
        except ValueError as error:
            return error

    def _opened(self, sample: Sample) -> ValueError | None:
        image = sample[0]
        if not isinstance(image, Path):
            return None
        try:
            check_header(image, self.reading)
        except Exception as error:
            return image_error(image, error)
        return None

    def batches(
        self, batches: Sequence[Tensor], device: torch.device, workers: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield the images (B, C, S, S) and labels (B,) of each index tensor, on the device.

        Close the generator if not all batches are taken: it ends the worker processes.

        Raises:
            ValueError: if an image cannot be read or a worker process dies.
            ShardError: if a shard cannot be fetched.
        """
        if self.pixels is not None:
            for indices in batches:
                at = indices.to(self.pixels.device)
                yield self.pixels[at].to(device), self.labels[at].to(device)
            return
        loader = DataLoader(
            self,
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise the global generator would be advanced
            worker_init_fn=_ignore_signals,
        )
        loaded: Any = None
        try:
            with held_back():  # the workers start here
                loaded = iter(loader)
            for images, labels in loaded:
                # asynchronous copies are only safe from pinned memory
                soon = device.type == "cuda"
                yield images.to(device, non_blocking=soon), labels.to(device, non_blocking=soon)
        except ValueError as error:  # its text contains the traceback of the worker process
            sentence = str(error).split("ValueError: ")[-1].strip()
            # the frames of the error would keep the workers alive
            hint = f"{SKIP_HINT}, in training only in a new run"
            raise ValueError(f"{sentence}; {hint}") from error.with_traceback(None)
        except ShardError as error:
            sentence = str(error).split("ShardError: ")[-1].strip()
            raise ShardError(sentence) from error.with_traceback(None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(f"one of the {workers} data.workers died: {error}") from error
        finally:
            # Ends the workers now. The frames of an error would keep them until the process exits,
            # which would then wait for them forever, as they ignore signals.
            del loaded

    def fingerprint(self) -> str:
        """Return a hash of the labels and of the names of files, with their folder or shard."""
        names = (_name(image) for image, _ in self.samples)
        text = "\n".join(
            f"{name} {label}" for name, (_, label) in zip(names, self.samples, strict=True)
        )
        # file names need not be valid UTF-8
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def shard_of(image: Tensor | Path | Item) -> int | None:
    """Return the number of the shard that contains an image, or None."""
    return image.shard if isinstance(image, Item) else None


def _name(image: Tensor | Path | Item) -> str:
    if isinstance(image, Path):
        return "/".join(image.parts[-2:])
    return image.name if isinstance(image, Item) else ""


def _ignore_signals(worker: int) -> None:
    """Ignore signals to the whole process group, as the run still needs its last batch.

    This is for Windows, where :func:`train.signals.held_back` does nothing.
    """
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


def decode(image: Tensor | Path | Item, size: int, reading: Reading | None = None) -> Tensor:
    """Return a sample's image as uint8 of shape (C, size, size).

    Images that are read are scaled until they cover the square and cropped at the center.

    Args:
        image: pixels, the path of a file or an item of a dataset.
        size: height and width in pixels.
        reading: how a file becomes pixels.

    Raises:
        ValueError: if the image cannot be read; it names the image.
    """
    if isinstance(image, Tensor):
        pixels = image
    else:
        opened = open_image(image, reading)
        pixels = v2.functional.pil_to_tensor(ImageOps.fit(opened, (size, size)))
    if pixels.shape[1:] != (size, size):
        pixels = v2.functional.resize(pixels, [size, size], antialias=True)
    return pixels


def open_image(image: Path | Item, reading: Reading | None = None) -> Image.Image:
    """Read an image: upright, on the background of ``reading``, by default as RGB.

    Raises:
        ValueError: if it cannot be read; it names the image.
        ShardError: if it is in a shard that cannot be fetched.
    """
    try:
        source = image if isinstance(image, Path) else image.read(image.index)
        return read_image(source, reading or Reading())
    except ShardError:
        raise
    except Exception as error:  # decoders raise exceptions of any type
        raise image_error(image, error) from error


def as_items(read: Callable[[int], Encoded], labels: Sequence[int]) -> list[tuple[Item, int]]:
    """Return one sample per label, whose image ``read(index)`` is read when it is needed."""
    return [(Item(read, i), label) for i, label in enumerate(labels)]


def count_channels(read: Callable[[int], Encoded], count: int) -> int:
    """Return 1 if ``count`` images, of which some are read, are grayscale, otherwise 3."""
    modes = {_mode(read, index) for index in _looked_at(count)} - {None}
    return 1 if modes and modes <= set(GRAYSCALE_MODES) else 3


def _looked_at(count: int) -> range:
    """Return the indices of those of ``count`` images whose modes are read."""
    return range(0, count, max(1, count // MODE_SAMPLES))


def item_channels(
    samples: Sequence[tuple[Item, int]], local: Collection[int] = ()
) -> tuple[int, list[str]]:
    """Return 1 if some images are all grayscale, otherwise 3; and a note if they decide on others.

    Args:
        samples: images with their labels.
        local: numbers of the shards that need not be fetched; of the others, only images in the
            first and last shard are looked at.
    """
    shards = {item.shard for item, _ in (*samples[:1], *samples[-1:])}.union(local)
    some = [item for item, _ in samples if item.shard in shards]
    channels = count_channels(lambda i: some[i].read(some[i].index), len(some))
    count = len(_looked_at(len(some)))
    if channels == 3 or count == len(samples):
        return channels, []
    return 1, [f"images are read as grayscale, as the {count:,} that were looked at are"]


def _mode(read: Callable[[int], Encoded], index: int) -> str | None:
    try:
        return image_mode(read(index))
    except Exception:  # the error is reported when the image is read
        return None
