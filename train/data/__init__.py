"""Datasets: each file with a reader registers it, and ``load_data`` makes three sets of it.

Training and validation images are a stratified split of the training set with a fixed seed. Models
are selected on the validation set; the test set is evaluated once, at the end.

To add a dataset, add one file to this folder::

    @register("my_images")
    def read_my_images(config: DataConfig) -> Source:
        return Source(train=[(Path("cat.png"), 0), ...], classes=["cat", "dog"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from vision_xformer.registry import import_all

from ..config import DataConfig
from .archives import unpack
from .images import Images, Item, Sample, decode, open_image
from .registry import Source, dataset_names, find_reader, register

__all__ = [
    "Images",
    "Item",
    "Sample",
    "Source",
    "Splits",
    "dataset_names",
    "decode",
    "load_data",
    "open_image",
    "register",
    "unpack",
]

SPLIT_SEED = 20211
TEST_FRACTION = 0.2  # held out if a dataset has no test images
IN_MEMORY = 2 * 2**30  # bytes of decoded images that are kept by default
LARGEST_GUESS = 128  # up to this size in pixels, the first image determines the size of all

import_all(__name__, __path__)
if DataConfig.__doc__ is not None:  # it is the text of --help
    DataConfig.__doc__ = DataConfig.__doc__.replace("DATASETS", ", ".join(dataset_names()))


class Splits(NamedTuple):
    """Training, validation and test images, and what a model and the augmentation must know.

    Args:
        train, val, test: the images, all of one size.
        classes: class names; a label is an index into them.
        channels: 3 for RGB, 1 for grayscale.
        image_size: height and width in pixels.
        mirror: whether a horizontally flipped image still belongs to its class.
    """

    train: Images
    val: Images
    test: Images
    classes: list[str]
    channels: int
    image_size: int
    mirror: bool


def load_data(config: DataConfig, device: torch.device | str = "cpu") -> Splits:
    """Read the dataset that a configuration names.

    Args:
        config: which dataset, and how to read it.
        device: where images are kept if they are decoded once.

    Raises:
        ValueError: if the name is unknown, if a file or folder is missing, empty or incomplete, or
            if an image cannot be read; it says which one.
    """
    source = find_reader(config.name)(config)
    _check_labels(config, source)
    size = config.image_size or source.image_size or _size_of(source.train[0][0])
    train, val, test = source.train, source.val, source.test
    if not test:
        train, test = split(train, TEST_FRACTION)
    if not val:
        train, val = split(train, config.val_fraction)
    parts = Images(train, size), Images(val, size), Images(test, size)
    count = sum(map(len, parts))
    in_memory = config.in_memory
    if in_memory is None:
        in_memory = count * source.channels * size * size <= IN_MEMORY
    if in_memory:
        few = count < 5000  # too few to need a progress bar
        with tqdm(total=count, desc="reading", unit="image", disable=few or None) as progress:
            for part in parts:
                part.keep(torch.device(device), progress)
    return Splits(*parts, list(source.classes), source.channels, size, source.mirror)


def _check_labels(config: DataConfig, source: Source) -> None:
    classes = range(len(source.classes))
    parts = source.train, source.val, source.test
    wrong = {label for part in parts for _, label in part if label not in classes}
    if wrong:
        raise ValueError(
            f"{config.name} in {config.root} has images of class {min(wrong)}; its {len(classes)} "
            f"classes are 0 to {len(classes) - 1}"
        )
    if not source.train:
        raise ValueError(f"{config.name} in {config.root} has no training images")


def _size_of(image: torch.Tensor | Path | Item) -> int:
    """Return the longer side of an image in pixels.

    Raises:
        ValueError: if it is too long to be taken for the size of all images.
    """
    if isinstance(image, torch.Tensor):
        height, width = image.shape[1:]
        name = "the first image"
    else:
        opened: Image.Image = open_image(image) if isinstance(image, Path) else image.open()
        width, height = opened.size
        name = str(image) if isinstance(image, Path) else "the first image"
    if max(width, height) > LARGEST_GUESS:
        raise ValueError(f"data.image_size is needed: {name} has {width} x {height} pixels")
    return max(width, height)


def split(samples: Sequence[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split samples into two lists, the second with a stratified ``fraction`` of them.

    Raises:
        ValueError: if there are too few images of a class.
    """
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
