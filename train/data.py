"""Readers: digits, CIFAR, Tiny ImageNet, image folders. Each gives three sets of (image, class).

Training and validation are a stratified split of the training set with a fixed seed: choices are
made on validation, and the test set is read once, at the end.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2
from tqdm import tqdm

from .config import DataConfig

SPLIT_SEED = 20211
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
IN_MEMORY = 2 * 2**30  # bytes of decoded images that are kept by default
LARGEST_GUESS = 128  # a folder's first image says its size up to here

Sample = tuple[Any, int]  # an image, uint8 (C, H, W), or a path to one; and its class


class Images(Dataset[tuple[Tensor, int]]):
    """Images of one size, uint8 (C, S, S), and their classes.

    Decoded once where :meth:`keep` was called, else whenever they are asked for.
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
        """Decode all images and hold them on the device."""
        pixels: Tensor | None = None
        with ThreadPoolExecutor() as pool:  # decoders leave Python's lock
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
        """The images (B, C, S, S) and classes (B,) of each tensor of indices, on the device."""
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
            generator=torch.Generator(),  # it would draw a number from everybody's
            worker_init_fn=_leave_signals_to_the_run,
        )
        try:
            for images, labels in loader:
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(f"one of the {workers} of data.workers is gone: {error}") from error

    def fingerprint(self) -> str:
        """Of the labels, and of the files' names from their class folders on."""
        names = ("/".join(i.parts[-2:]) if isinstance(i, Path) else "" for i, _ in self.samples)
        text = "\n".join(
            f"{name} {label}" for name, (_, label) in zip(names, self.samples, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _leave_signals_to_the_run(worker: int) -> None:
    """A scheduler signals the whole group; the run still wants the images of its last step."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


class Splits(NamedTuple):
    """Three sets of images, and what a model and the augmentation must know.

    ``mirror``: whether a mirror image is of the same class.
    """

    train: Images
    val: Images
    test: Images
    classes: list[str]
    channels: int
    image_size: int
    mirror: bool


def decode(image: Any, size: int) -> Tensor:
    """A sample's image as uint8 (C, size, size): scaled until it covers that, and cut to it."""
    if isinstance(image, Path):
        image = v2.functional.pil_to_tensor(ImageOps.fit(open_image(image), (size, size)))
    if image.shape[1:] != (size, size):
        image = v2.functional.resize(image, [size, size], antialias=True)
    tensor: Tensor = image
    return tensor


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


def load_data(config: DataConfig, device: torch.device | str = "cpu") -> Splits:
    """Read the data set a configuration names.

    Raises:
        ValueError: for a folder that is missing, empty or half-written, or an image that cannot be
            read; it names what is wrong.
    """
    readers = {
        "digits": _digits,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "tiny_imagenet": _tiny_imagenet,
        "imagefolder": _image_folder,
    }
    train, val, test, classes, size = readers[config.name](config)
    digits = config.name == "digits"
    wrong = {label for _, label in [*train, *val, *test] if not 0 <= label < len(classes)}
    if wrong:
        raise ValueError(
            f"{config.name} in {config.root} has images of class {min(wrong)}; its {len(classes)} "
            f"classes are 0 to {len(classes) - 1}"
        )
    if not val:
        train, val = _split(train, config.val_fraction)
    parts = Images(train, size), Images(val, size), Images(test, size)
    channels, count = 1 if digits else 3, sum(map(len, parts))
    in_memory = config.in_memory
    if in_memory is None:
        in_memory = count * channels * size * size <= IN_MEMORY
    if in_memory:
        few = count < 5000  # nothing to wait for
        with tqdm(total=count, desc="reading", unit="image", disable=few or None) as progress:
            for part in parts:
                part.keep(torch.device(device), progress)
    return Splits(*parts, classes, channels, size, not digits)


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


def _cifar(config: DataConfig) -> Read:
    """Checked against the authors' checksums."""
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[config.name]
    root = Path(config.root).expanduser()
    folder = root / source.base_folder
    if not folder.exists() and (root / "train").is_dir():
        raise ValueError(
            f"{root} has no {source.base_folder}; it looks like an image folder: use "
            "--data.name imagefolder"
        )
    if config.mirror is not None:
        url = f"{config.mirror.rstrip('/')}/{source.filename}"
        source = type(source.__name__, (source,), {"url": url})
    try:
        sets = [source(root, train=train, download=not folder.exists()) for train in (True, False)]
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(
            f"no whole {config.name} in {root} (expected {folder}, as unpacked from "
            f"{source.filename}), and it could not be downloaded: {error}"
        ) from error
    train, test = (
        list(zip(torch.from_numpy(s.data).permute(0, 3, 1, 2), s.targets, strict=True))
        for s in sets
    )
    return train, [], test, list(sets[0].classes), config.image_size or 32


def _check_inside(archive: Path, names: Sequence[str]) -> None:
    """Raise a ValueError for a path that leads out of the folder it is unpacked in."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{archive} has the path {name}, out of its folder")


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar file into ``target``, whole or not at all and nowhere else.

    Raises:
        ValueError: for an archive that is torn, or has a link or a path out of the target.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _check_inside(archive, file.namelist())
                file.extractall(part)
        else:
            with tarfile.open(archive) as file:
                for member in file:
                    if not (member.isfile() or member.isdir()):
                        raise ValueError(f"{archive} has {member.name}, no plain file or folder")
                _check_inside(archive, file.getnames())
                # Pythons before 3.11.4 do not know the filter, which drops owners and modes
                more: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                file.extractall(part, **more)
        part.rename(target)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tiny_imagenet(config: DataConfig) -> Read:
    """Its own layout. The 10,000 validation images, whose classes are known, are the test set."""
    root = Path(config.root).expanduser()
    if not (root / "wnids.txt").is_file():
        folder = root / "tiny-imagenet-200"
        archives = sorted(root.glob("tiny-imagenet-200*.*")) if root.is_dir() else []
        if not folder.is_dir() and archives:
            unpacked = root / "unpacked"
            unpack(archives[0], unpacked)
            inner = unpacked / folder.name
            (inner if inner.is_dir() else unpacked).rename(folder)
        root = folder if folder.is_dir() else root
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
    words = root / "words.txt"  # wnid, tab, its names
    lines = words.read_text().splitlines() if words.is_file() else []
    names = {wnid: name.split(",")[0] for wnid, _, name in (line.partition("\t") for line in lines)}
    classes = [names.get(wnid, wnid) for wnid in wnids]
    # two classes may have one name
    classes = [
        f"{c} {w}" if classes.count(c) > 1 else c for c, w in zip(classes, wnids, strict=True)
    ]
    return train, [], test, classes, config.image_size or 64


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
