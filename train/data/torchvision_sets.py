"""The classification datasets of torchvision, as ``torchvision:NAME``.

Splits follow the constructor's ``train`` or ``split`` argument. Other arguments are appended:
``torchvision:EMNIST:split=letters`` or ``torchvision:DTD:partition=2``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets
from torchvision.datasets import VisionDataset
from tqdm import tqdm

from vision_xformer.options import check_options

from ..config import DataConfig
from .images import as_items, item_channels
from .reading import image_error
from .registry import Source, parse_options, register

# Digits, letters, traffic signs and rendered text mean something else when flipped.
NOT_MIRRORED = {"EMNIST", "GTSRB", "KMNIST", "MNIST", "Omniglot", "QMNIST", "RenderedSST2",
                "SEMEION", "SVHN", "USPS"}  # fmt: skip
# What torchvision's classes call each part; the first that a class knows is read.
SPLITS = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid"),
    "test": ("test",),
}
LABELS = ("targets", "labels", "_labels", "y")  # attributes that may hold all labels
CLASSES = ("classes", "categories", "bin_classes")  # attributes that may hold the class names
SAMPLES = ("samples", "_samples")  # and attributes that may hold (file, label)
# Neither these nor the modules of stereo matching and optical flow label images with a class.
OTHER_TASKS = {
    "CelebA", "Cityscapes", "CocoCaptions", "CocoDetection", "DatasetFolder", "FakeData",
    "Flickr30k", "Flickr8k", "HMDB51", "ImageFolder", "Kinetics", "Kitti", "LFWPairs", "LSUN",
    "LSUNClass", "MovingMNIST", "PhotoTour", "SBDataset", "SBU", "UCF101", "VOCDetection",
    "VOCSegmentation", "VisionDataset", "WIDERFace",
}  # fmt: skip
OTHER_MODULES = ("_optical_flow", "_stereo_matching")
# Parameters that the reader sets or leaves alone
_OURS = {"root", "train", "what", "download", "transform", "target_transform", "transforms",
         "loader", "is_valid_file", "allow_empty"}  # fmt: skip


@register("torchvision", argument=":NAME")
def read_torchvision(config: DataConfig) -> Source:
    """Read a dataset of torchvision, and download it if it is missing.

    A validation split is the test set if there is no other; images are decoded when needed. The
    images' modes determine whether they are grayscale.

    Raises:
        ValueError: if the name or an option is unknown, if the files are incomplete and cannot be
            downloaded, or if images are not labeled with one class each.
    """
    _, _, name = config.name.partition(":")
    name, *words = name.split(":")
    dataset = _find(name)
    name = dataset.__name__
    options = parse_options(words)
    parameters = _parameters(dataset)
    check_options(f"torchvision:{name}", options, _options(parameters))
    for key in _options(parameters):
        if parameters[key].default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"data.name torchvision:{name} needs :{key}=...")
    root = Path(config.root).expanduser()
    parts = _read_parts(dataset, root, parameters, options)
    labels = {part: _labels(found, name) for part, found in parts.items()}
    samples = {
        part: as_items(functools.partial(_image, found), labels[part])
        for part, found in parts.items()
    }
    if "test" not in samples and "val" in samples:
        samples["test"] = samples.pop("val")
    channels, notes = item_channels(samples["train"])
    highest = max(max(part, default=0) for part in labels.values())
    return Source(
        samples["train"],
        _class_names(parts["train"], highest + 1),
        test=samples.get("test", []),
        val=samples.get("val", []),
        channels=channels,
        mirror=name not in NOT_MIRRORED,
        notes=notes,
    )


def _find(name: str) -> type[VisionDataset]:
    """Return torchvision's class of this name, whose case does not matter."""
    known = {cls.__name__.lower(): cls for cls in _classification_sets()}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        nearest = known[near[0]].__name__ if near else None
        hint = f"did you mean torchvision:{nearest}?" if near else "one is torchvision:MNIST"
        raise ValueError(f"torchvision has no dataset {name!r} for classification; {hint}")
    return known[name.lower()]


def _classification_sets() -> list[type[VisionDataset]]:
    found = [getattr(datasets, name) for name in datasets.__all__ if name not in OTHER_TASKS]
    return [
        cls for cls in found if inspect.isclass(cls) and not cls.__module__.endswith(OTHER_MODULES)
    ]


def _parameters(dataset: type[VisionDataset]) -> dict[str, inspect.Parameter]:
    """Return the constructor's parameters; those behind **kwargs are its base class's."""
    parameters: dict[str, inspect.Parameter] = {}
    for cls in dataset.__mro__:
        own = inspect.signature(cls).parameters
        more = [key for key, p in own.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
        for key, parameter in own.items():
            if key not in more:
                parameters.setdefault(key, parameter)
        if not more:
            break
    return parameters


def _options(parameters: dict[str, inspect.Parameter]) -> list[str]:
    """Return the parameters that are left to the user; with ``train``, ``split`` is one of them."""
    ours = _OURS if "train" in parameters else _OURS | {"split"}
    return [key for key in parameters if key not in ours]


def _read_parts(
    dataset: type[VisionDataset],
    root: Path,
    parameters: dict[str, inspect.Parameter],
    options: dict[str, str | int],
) -> dict[str, VisionDataset]:
    """Return the parts "train", and "val" and "test" if the dataset has them."""
    choices: dict[str, list[dict[str, Any]]]
    if "train" in parameters:
        choices = {"train": [{"train": True}], "test": [{"train": False}]}
    elif "split" in parameters:
        choices = {part: [{"split": name} for name in names] for part, names in SPLITS.items()}
    else:
        choices = {"train": [{}]}
    parts = {}
    for part, arguments in choices.items():
        for chosen in arguments:
            try:
                parts[part] = _construct(
                    dataset, root, "download" in parameters, {**options, **chosen}
                )
                break
            except ValueError as error:
                if not ("split" in chosen and "for argument split" in str(error)):
                    raise
    if "train" not in parts:
        raise ValueError(f"torchvision:{dataset.__name__} has no training split")
    # The labels of some test splits are not public: they are None.
    return {
        part: found
        for part, found in parts.items()
        if part == "train" or (len(found) and _item(found, 0)[1] is not None)
    }


def _construct(
    dataset: type[VisionDataset], root: Path, downloads: bool, arguments: dict[str, Any]
) -> VisionDataset:
    """Return the dataset; if it is missing or incomplete, it is downloaded."""
    try:
        try:
            return dataset(root, **arguments)
        except (RuntimeError, OSError, EOFError):
            if not downloads:
                raise
            return dataset(root, download=True, **arguments)
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(
            f"{root} has no complete torchvision:{dataset.__name__}, and it could not be "
            f"downloaded: {error}"
        ) from error


def _image(dataset: VisionDataset, index: int) -> Image.Image:
    return dataset[index][0]


def _item(dataset: VisionDataset, index: int) -> tuple[Any, Any]:
    """Return an image and its label; an error of a decoder names the image."""
    try:
        return dataset[index]
    except Exception as error:  # decoders raise exceptions of any type
        raise image_error(f"image {index} of {type(dataset).__name__}", error) from error


def _labels(dataset: VisionDataset, name: str) -> list[int]:
    """Return all labels: from a list that the dataset has, or else from its items.

    Raises:
        ValueError: if items are not images with one integer label each.
    """
    count = len(dataset)
    if count == 0:
        return []
    try:
        ends = {i: operator.index(_item(dataset, i)[1]) for i in (0, count - 1)}
        if not isinstance(_item(dataset, 0)[0], Image.Image):
            raise TypeError(f"items begin with {type(_item(dataset, 0)[0]).__name__}")
        for known in _listed_labels(dataset):
            if len(known) == count and all(known[i] == label for i, label in ends.items()):
                return known
        items = tqdm(range(count), desc="reading labels", unit="image", disable=None)
        return [operator.index(_item(dataset, i)[1]) for i in items]
    except TypeError as error:
        raise ValueError(
            f"torchvision:{name} does not label each image with one class: {error}"
        ) from error


def _listed_labels(dataset: VisionDataset) -> list[list[int]]:
    """Return the lists of integers among the attributes that may hold all labels."""
    found = [getattr(dataset, key, None) for key in LABELS]
    for key in SAMPLES:
        found.append([label for _, label in getattr(dataset, key, ())])
    lists = []
    for values in found:
        try:
            lists.append([operator.index(value) for value in values or ()])
        except (TypeError, ValueError, RuntimeError):
            continue  # not one integer per image
    return lists


def _class_names(dataset: VisionDataset, count: int) -> list[str]:
    """Return the dataset's class names, or numbers if it names fewer than ``count`` classes.

    Of several lists, the one of this length is that of the labels: Oxford-IIIT Pet has two.
    """
    lists = [getattr(dataset, key, None) or [] for key in CLASSES]
    fitting = [names for names in lists if len(names) >= count]
    if not fitting:
        return [str(label) for label in range(count)]
    names = min(fitting, key=lambda names: len(names) != count)
    return [name if isinstance(name, str) else ", ".join(name) for name in names]
