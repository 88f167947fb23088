"""Datasets: each file registers a reader, and ``load_data`` builds three sets from its images.

Training and validation images are a stratified split of the training set with a fixed seed. Models
are selected on the validation set; the test set is evaluated once, at the end.

To add a dataset, add one file to this folder::

    @register("my_images")
    def read_my_images(config: DataConfig) -> Source:
        return Source(train=[(Path("cat.png"), 0), ...], classes=["cat", "dog"])
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import ImageColor
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from vision_xformer.registry import import_all

from ..config import DataConfig
from .archives import unpack
from .images import SKIP_HINT, Broken, Images, Item, Sample, decode, open_image, shard_of
from .reading import Reading
from .registry import Source, dataset_names, find_reader, register
from .summary import count_classes, list_broken, without

__all__ = [
    "Images",
    "Item",
    "Reading",
    "Sample",
    "Source",
    "Splits",
    "dataset_names",
    "decode",
    "load_data",
    "open_image",
    "reading_of",
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
    """Training, validation and test images, and what a model and the augmentation depend on.

    Args:
        train, val, test: the images, all of one size.
        classes: class names; a label is an index into them.
        channels: 3 for RGB, 1 for grayscale.
        image_size: height and width in pixels.
        mirror: whether a horizontally flipped image still belongs to its class.
        notes: lines about the data to show to the user.
    """

    train: Images
    val: Images
    test: Images
    classes: list[str]
    channels: int
    image_size: int
    mirror: bool
    notes: Sequence[str] = ()


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
    reading = reading_of(config, source.channels)
    size = config.image_size or source.image_size or _size_of(source.train, reading)
    read_parts = functools.partial(
        _read_parts, config=config, size=size, reading=reading, device=device
    )
    (train, val, test), broken = read_parts(source, fully=config.skip_broken)
    notes = list(source.notes)
    if broken:
        if not config.skip_broken:
            raise ValueError(f"{list_broken(broken)}; {SKIP_HINT}")
        notes.append(f"left out by data.skip_broken: {list_broken(broken)}")
        source = without(source, broken)
        (train, val, test), _ = read_parts(source, fully=False)
    if not isinstance(source.train[0][0], torch.Tensor):
        notes += count_classes((train, val, test), source.classes)
    classes, channels, mirror = list(source.classes), source.channels, source.mirror
    return Splits(train, val, test, classes, channels, size, mirror, notes)


def reading_of(config: DataConfig, channels: int) -> Reading:
    """Return how a configuration reads image files, as images with 1 or 3 channels.

    Raises:
        ValueError: for a ``data.background`` that is not a color.
    """
    try:
        background = ImageColor.getrgb(config.background)[:3]
    except ValueError as error:
        raise ValueError(
            f"data.background {config.background!r} must be the name of a color or #rrggbb"
        ) from error
    return Reading("L" if channels == 1 else "RGB", background, config.max_value)


def _read_parts(
    source: Source,
    config: DataConfig,
    size: int,
    reading: Reading,
    device: torch.device | str,
    fully: bool,
) -> tuple[list[Images], Broken]:
    """Split the images and keep or check them; return the sets and the broken images."""
    train, val, test = source.train, source.val, source.test
    if not test:
        train, test = split(train, TEST_FRACTION)
    if not val:
        train, val = split(train, config.val_fraction, "data.val_fraction")
    parts = [Images(_by_shard(samples), size, reading) for samples in (train, val, test)]
    count = sum(map(len, parts))
    in_memory = config.in_memory
    if in_memory is None:
        in_memory = count * source.channels * size * size <= IN_MEMORY
    few = count < 5000  # no progress bar
    what = "reading" if in_memory else "checking"
    broken: Broken = {}
    with tqdm(total=count, desc=what, unit="image", disable=few or None) as progress:
        for part in parts:
            if in_memory:
                broken |= part.keep(torch.device(device), progress)
            else:
                broken |= part.find_broken(progress, fully)
    return parts, broken


def _by_shard(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return samples in the order of their shards, if any: splitting has mixed them."""
    in_shards = samples and shard_of(samples[0][0]) is not None
    return sorted(samples, key=_position) if in_shards else samples


def _position(sample: Sample) -> tuple[int, int]:
    assert isinstance(sample[0], Item)
    return sample[0].shard or 0, sample[0].index


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


def _size_of(samples: Sequence[Sample], reading: Reading) -> int:
    """Return the longer side in pixels of the first image that can be read.

    Raises:
        ValueError: if it is too large to guess the size of all images from, or if no image can be
            read.
    """
    problem: ValueError | None = None
    for image, _ in samples:
        if isinstance(image, torch.Tensor):
            height, width = image.shape[1:]
        else:
            try:
                width, height = open_image(image, reading).size
            except ValueError as error:
                problem = problem or error
                continue
        if max(width, height) > LARGEST_GUESS:
            name = image if isinstance(image, Path) else "the first image"
            raise ValueError(f"data.image_size is needed: {name} has {width} x {height} pixels")
        return max(width, height)
    assert problem is not None
    raise problem


def split(
    samples: Sequence[Sample], fraction: float, option: str = ""
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into two lists, the second with a stratified ``fraction`` of them.

    If a class has only one image, it is in the first list.

    Args:
        samples: images with their labels.
        fraction: of the images.
        option: the option that sets it, for errors; "" if none does.

    Raises:
        ValueError: if one of the lists would have fewer images than classes.
    """
    counts = Counter(label for _, label in samples)
    alone = [sample for sample in samples if counts[sample[1]] == 1]  # cannot be stratified
    rest = [sample for sample in samples if counts[sample[1]] > 1] if alone else samples
    labels = [label for _, label in rest]
    try:
        first, second = train_test_split(
            rest, test_size=fraction, random_state=SPLIT_SEED, stratify=labels
        )
    except ValueError as error:
        given = f"{option} {fraction:g}: " if option else ""
        hint = _possible(len(rest), len(set(labels))) if option else " for testing: add images"
        raise ValueError(
            f"{given}{len(samples)} images of {len(counts)} classes are too few to hold out "
            f"{fraction:.1%} of each class{hint}"
        ) from error
    return [*first, *alone], second


def _possible(images: int, classes: int) -> str:
    """Say which fractions would leave an image per class in both lists."""
    if images < max(1, 2 * classes):
        return ": add images"
    least = math.ceil(1000 * classes / images) / 1000
    return f": add images, or choose {least:g} to {1 - least:g}"
