"""Readers: digits, CIFAR-10, Tiny ImageNet, image folders. Each gives three sets of (image, class).

Training and validation are a stratified split of the training set with a fixed seed: choices are
made on validation, and the test set is read once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from .config import DataConfig

SPLIT_SEED = 20211
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
LARGEST_GUESS = 128  # a folder's first image says its size up to here

Sample = tuple[Any, int]  # an image, PIL or uint8 (C, H, W), or a path to one; and its class


class Splits(NamedTuple):
    """Three data sets of float (C, H, W) images and class numbers, and what a model must know."""

    train: Images
    val: Images
    test: Images
    classes: list[str]
    channels: int
    image_size: int


class Images(Dataset[tuple[Tensor, int]]):
    """Samples through a transform; a path is opened when it is asked for."""

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Any], Tensor]) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        if isinstance(image, Path):
            image = open_image(image)
        return self.transform(image), label


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB, whole; a ValueError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL would clip what is above 255
                image = image.point(lambda value: value / 257, "L")
            elif image.mode in ("I", "F"):
                raise ValueError(
                    f"{path} has pixels of mode {image.mode!r}: save it with 8 or 16 bits"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def load_data(config: DataConfig) -> Splits:
    """Read the data set a configuration names.

    Raises:
        ValueError: for a folder that is missing, empty or half-written; it names what is wrong.
    """
    readers = {
        "digits": _digits,
        "cifar10": _cifar10,
        "tiny_imagenet": _tiny_imagenet,
        "imagefolder": _image_folder,
    }
    train, val, test, classes, size = readers[config.name](config)
    channels = 1 if config.name == "digits" else 3
    if not val:
        train, val = _split(train, config.val_fraction)
    plain = _transform(size, channels, augment=False, mirror=False)
    augmented = _transform(size, channels, config.augment, mirror=config.name != "digits")
    return Splits(
        Images(train, augmented), Images(val, plain), Images(test, plain), classes, channels, size
    )


def _transform(size: int, channels: int, augment: bool, mirror: bool) -> Callable[[Any], Tensor]:
    steps: list[Any] = [v2.ToImage(), v2.Resize((size, size), antialias=True)]
    if augment:
        steps.append(v2.RandomCrop(size, padding=max(1, size // 8)))
        if mirror:
            steps.append(v2.RandomHorizontalFlip())
    to_unit = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * channels, [0.5] * channels),
    ]
    return v2.Compose([*steps, *to_unit, v2.ToPureTensor()])


def _split(samples: list[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    labels = [label for _, label in samples]
    try:
        first, second = train_test_split(
            samples, test_size=fraction, random_state=SPLIT_SEED, stratify=labels
        )
    except ValueError as error:
        raise ValueError(
            f"{len(samples)} images of {len(set(labels))} classes are too few to hold out "
            f"{fraction:.1%} of each class"
        ) from error
    return first, second


# train, validation (empty: to be split off), test, class names, image size
Read = tuple[list[Sample], list[Sample], list[Sample], list[str], int]


def _digits(config: DataConfig) -> Read:
    """1,797 handwritten digits of 8 x 8 pixels (UCI), which come with scikit-learn."""
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    samples = list(zip(images, map(int, digits.target), strict=True))
    train, test = _split(samples, 0.2)
    return train, [], test, [str(name) for name in digits.target_names], config.image_size or 8


def _cifar10(config: DataConfig) -> Read:
    root = Path(config.root)
    folder = root / CIFAR10.base_folder
    if not folder.exists() and (root / "train").is_dir():
        raise ValueError(
            f"{root} has no {CIFAR10.base_folder}; it looks like an image folder: use "
            "--data.name imagefolder"
        )
    try:
        sets = [CIFAR10(root, train=train, download=not folder.exists()) for train in (True, False)]
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(
            f"no whole CIFAR-10 in {root} (expected {folder}, as unpacked from "
            f"{CIFAR10.filename}), and it could not be downloaded: {error}"
        ) from error
    train, test = (
        list(zip(torch.from_numpy(s.data).permute(0, 3, 1, 2), s.targets, strict=True))
        for s in sets
    )
    return train, [], test, list(sets[0].classes), config.image_size or 32


def _tiny_imagenet(config: DataConfig) -> Read:
    """Its own layout. The 10,000 validation images, whose classes are known, are the test set."""
    root = Path(config.root)
    if not (root / "wnids.txt").is_file() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    for name in ("wnids.txt", "val/val_annotations.txt"):
        if not (root / name).is_file():
            raise ValueError(f"no Tiny ImageNet in {root}: {name} is missing")
    wnids = (root / "wnids.txt").read_text().split()
    number = {wnid: i for i, wnid in enumerate(wnids)}
    if len(number) != len(wnids) or len(wnids) < 2:
        raise ValueError(f"{root / 'wnids.txt'} must list 2 or more classes, each once")
    train: list[Sample] = []
    for wnid in wnids:
        files = _image_files(root / "train" / wnid / "images")
        if not files:
            raise ValueError(f"no training images of class {wnid} in {root / 'train' / wnid}")
        train += [(path, number[wnid]) for path in files]
    test: list[Sample] = []
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        file, wnid, *_ = [*line.split("\t"), ""]
        path = root / "val" / "images" / file
        if wnid not in number:
            raise ValueError(f"val_annotations.txt in {root}: class {wnid!r} is not in wnids.txt")
        if not path.is_file():
            raise ValueError(f"val_annotations.txt in {root} lists {file}, which is missing")
        test.append((path, number[wnid]))
    if not test:
        raise ValueError(f"{root / 'val' / 'val_annotations.txt'} is empty")
    return train, [], test, wnids, config.image_size or 64


def _image_folder(config: DataConfig) -> Read:
    """``root/train/<class>/*``, ``root/val`` and ``root/test`` alike; or ``root/<class>/*`` alone.

    Without ``test``, ``val`` is the test set; without either, a stratified fifth is.
    """
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder")
    val: list[Sample] = []
    if not (root / "train").is_dir():
        samples, classes = _class_folders(root)
        train, test = _split(samples, 0.2)
    else:
        train, classes = _class_folders(root / "train")
        held_out = [
            _class_folders(root / name, classes)[0]
            for name in ("test", "val")
            if (root / name).is_dir()
        ]
        if held_out:
            test, val = held_out[0], held_out[1] if len(held_out) == 2 else []
        else:
            train, test = _split(train, 0.2)
    size = config.image_size
    if size is None:
        first = min(path for path, _ in train)
        width, height = open_image(first).size
        size = max(width, height)
        if size > LARGEST_GUESS:
            raise ValueError(f"data.image_size is needed: {first} has {width} x {height} pixels")
    return train, val, test, classes, size


def _class_folders(root: Path, expected: list[str] | None = None) -> tuple[list[Sample], list[str]]:
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{root} needs a folder for each of at least 2 classes, has {classes}")
    if expected is not None and classes != expected:
        differing = ", ".join(sorted(set(classes) ^ set(expected))[:5])
        raise ValueError(
            f"{root.parent / 'train'} and {root} differ in their class folders: {differing}"
        )
    samples: list[Sample] = []
    for label, name in enumerate(classes):
        files = _image_files(root / name)
        if not files:
            raise ValueError(
                f"no images in the class folder {root / name} (its own folders are not searched)"
            )
        samples += [(path, label) for path in files]
    return samples, classes


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".") and p.is_file()
    )
