"""Labeled images: decoding, and sets of them that are kept in memory or read when needed."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
GRAYSCALE_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
MODE_SAMPLES = 64  # images whose modes decide whether a dataset is grayscale


@dataclasses.dataclass(frozen=True)
class Item:
    """An image of a dataset that is read when it is needed.

    Args:
        read: maps an index to an image.
        index: index of this image.
        mode: "RGB" or "L", the mode that the image is converted to.
    """

    read: Callable[[int], Image.Image]
    index: int
    mode: str

    def open(self) -> Image.Image:
        """Read and convert the image.

        Raises:
            ValueError: if the image cannot be read.
        """
        try:
            return _convert(self.read(self.index), self.mode)
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(
                f"image {self.index} of the dataset cannot be read: {error}"
            ) from error


# uint8 (C, H, W), the path of a file or an item of a dataset; and the label
Sample = tuple[Tensor | Path | Item, int]


class Images(Dataset[tuple[Tensor, int]]):
    """Images of one size, uint8 of shape (C, S, S), and their labels.

    Images are decoded once if :meth:`keep` is called, otherwise each time they are accessed.

    Args:
        samples: images with their labels.
        size: height and width S in pixels.
    """

    def __init__(self, samples: Sequence[Sample], size: int) -> None:
        self.samples, self.size = samples, size
        self.labels = torch.tensor([label for _, label in samples])
        self.pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        return decode(image, self.size), label

    def keep(self, device: torch.device, progress: tqdm[Any]) -> None:
        """Decode all images and keep them on the device."""
        pixels: Tensor | None = None
        with ThreadPoolExecutor() as pool:  # decoders release the GIL
            images = pool.map(lambda sample: decode(sample[0], self.size), self.samples)
            for i, image in enumerate(images):
                if pixels is None:
                    pixels = image.new_empty(len(self), *image.shape)
                pixels[i] = image
                progress.update()
        assert pixels is not None
        self.pixels, self.labels = pixels.to(device), self.labels.to(device)

    def batches(
        self, batches: Sequence[Tensor], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images (B, C, S, S) and labels (B,) of each index tensor, on the device.

        Raises:
            ValueError: if an image cannot be read or a worker process dies.
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
        try:
            for images, labels in loader:
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(f"one of the {workers} data.workers died: {error}") from error

    def fingerprint(self) -> str:
        """Return a hash of the labels and of the file names with their class folders."""
        names = ("/".join(i.parts[-2:]) if isinstance(i, Path) else "" for i, _ in self.samples)
        text = "\n".join(
            f"{name} {label}" for name, (_, label) in zip(names, self.samples, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _ignore_signals(worker: int) -> None:
    """Schedulers signal the whole process group, but the run still needs its last batch."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


def decode(image: Tensor | Path | Item, size: int) -> Tensor:
    """Return a sample's image as uint8 of shape (C, size, size).

    Images that are read are scaled until they cover the square and cropped at the center.

    Raises:
        ValueError: if the image cannot be read.
    """
    if isinstance(image, Tensor):
        pixels = image
    else:
        opened = open_image(image) if isinstance(image, Path) else image.open()
        pixels = v2.functional.pil_to_tensor(ImageOps.fit(opened, (size, size)))
    if pixels.shape[1:] != (size, size):
        pixels = v2.functional.resize(pixels, [size, size], antialias=True)
    return pixels


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB, with its EXIF orientation applied.

    Raises:
        ValueError: if the file cannot be read; it names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"{path} has pixels of mode {image.mode!r}: save it with 8 or 16 bits"
                )
            return ImageOps.exif_transpose(_eight_bits(image)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit images to 8 bits; PIL would clip values above 255."""
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value / 257, "L")
    return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    image = _eight_bits(image)
    return image if image.mode == mode else image.convert(mode)


def as_items(
    read: Callable[[int], Image.Image], labels: Sequence[int], channels: int
) -> list[Sample]:
    """Return one sample per label, whose image ``read(index)`` is read when it is needed."""
    mode = "L" if channels == 1 else "RGB"
    return [(Item(read, i, mode), label) for i, label in enumerate(labels)]


def count_channels(read: Callable[[int], Image.Image], count: int) -> int:
    """Return 1 if ``count`` images, of which some are read, are grayscale, otherwise 3."""
    indices = range(0, count, max(1, count // MODE_SAMPLES))
    return 1 if all(read(i).mode in GRAYSCALE_MODES for i in indices) else 3


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder, sorted; hidden files and subfolders are skipped."""
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".") and p.is_file()
    )
