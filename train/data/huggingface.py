"""Hugging Face datasets, from a folder written by ``save_to_disk`` or streamed."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from vision_xformer.options import check_options

from ..config import DataConfig
from ..text import reason
from .images import Item, item_channels
from .registry import Source, parse_options, register
from .streaming import Streams, check_labels

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
LABELS = ("label", "labels")  # names of columns with a label, if none is a ClassLabel


@register("huggingface", argument="[:OPTION=VALUE]")
def read_huggingface(config: DataConfig) -> Source:
    """Read the splits of a dataset with an image column and a label column.

    ``data.root`` is a folder written by ``save_to_disk``; nothing is downloaded. With
    ``huggingface:streaming=true`` it is a folder of Parquet or Arrow files or a name on the Hub,
    from which a few files at a time are copied to this machine. Columns are found by their type; if
    there are several, name them: ``huggingface:label=fine_label``. The labels of each split are
    mapped by name to the classes of the training split. A split is left out if it is empty or all
    of its labels are -1, that is, not public. Without a test split, the validation split is the
    test set.

    Raises:
        ValueError: if ``datasets`` is not installed, if ``data.root`` is not such a folder, if the
            columns of the image and the label are ambiguous or missing in a split, if the training
            split is empty, or if a label is missing or not a class of the training split.
    """
    library = _library()
    options = parse_options(config.name.split(":")[1:])
    check_options("huggingface", options, ("image", "label", "streaming", "config"))
    read: Callable[[Any, str, str], tuple[list[Item], list[Any]]] = _read_saved
    if options.get("streaming") is True:
        streams = Streams(library, config.root, options.get("config"))
        splits, read = streams.splits, streams.read
    elif {"streaming", "config"} & options.keys():
        raise ValueError("data.name: streaming must be true, and config needs streaming=true")
    else:
        splits = _load(library, Path(config.root).expanduser())
    parts = _parts(splits, config.root)
    train = splits[parts["train"]].features
    image = _find_column(train, "image", options.get("image"))
    _check_column(train, "image", image, f"split 'train' of {config.root}")
    label = _find_column(train, "label", options.get("label"))
    samples: dict[str, list[tuple[Item, int]]] = {}
    classes: list[str] = []
    for part, name in parts.items():  # the training split is the first
        split, where = splits[name], f"split {name!r} of {config.root}"
        _check_column(split.features, "image", image, where)
        _check_column(split.features, "label", label, where)
        items, values = read(split, image, label)
        if part == "train":
            classes = _class_names(split.features[label], values)
        numbers = _numbers(split.features[label], values, classes, where)
        if numbers:
            samples[part] = list(zip(items, numbers, strict=True))
        elif part == "train":
            raise ValueError(f"{where} has no labeled images")
    if "test" not in samples and "val" in samples:
        samples["test"] = samples.pop("val")
    channels, notes = item_channels(samples["train"])
    return Source(
        samples["train"],
        classes,
        test=samples.get("test", []),
        val=samples.get("val", []),
        channels=channels,
        notes=notes,
    )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data.name huggingface needs the package datasets: pip install datasets"
        ) from error
    return datasets


def _load(library: Any, root: Path) -> dict[str, Any]:
    """Return the splits of a folder written by ``save_to_disk``; a single dataset is "train"."""
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder")
    try:
        loaded = library.load_from_disk(str(root))
    except IndexError as error:  # datasets writes no file for a split without rows
        raise ValueError(f"{root} has a split without rows, which datasets cannot read") from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{root} is not a folder written by save_to_disk of a Dataset or DatasetDict: "
            f"{reason(error)}"
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _parts(splits: dict[str, Any], root: str) -> dict[str, str]:
    """Return the names of the splits that are "train", "val" and "test", if they exist."""
    parts = {part: name for part, names in SPLITS.items() for name in names if name in splits}
    if "train" not in parts:
        raise ValueError(f"{root} has no split 'train', only {', '.join(splits) or 'none'}")
    return parts


def _read_saved(dataset: Any, image: str, label: str) -> tuple[list[Item], list[Any]]:
    """Return the images and labels of a split that is on this machine."""
    dataset = dataset.with_format(None)  # it may have been saved to return tensors
    encoded = type(dataset.features[image])(decode=False)  # our reader decodes all images
    images = dataset.select_columns([image]).cast_column(image, encoded)
    read = functools.partial(_image, images, image)
    labels = list(dataset[label])
    check_labels(labels, label, "the dataset")
    return [Item(read, i) for i in range(len(dataset))], labels


def _find_column(features: Any, kind: Literal["image", "label"], name: str | int | None) -> str:
    """Return the column with the images or labels: the one named, or the only one of its type."""
    if name is not None:
        return str(name)
    wanted = {"image": "Image", "label": "ClassLabel"}[kind]
    found = [key for key, feature in features.items() if type(feature).__name__ == wanted]
    if not found and kind == "label":
        found = [key for key in LABELS if key in features]
    if len(found) != 1:
        raise ValueError(
            f"{len(found) or 'no'} columns of {', '.join(features)} may hold the {kind}: name it, "
            f"--data.name huggingface:{kind}=COLUMN"
        )
    return found[0]


def _check_column(features: Any, kind: Literal["image", "label"], column: str, where: str) -> None:
    """Raise a ValueError unless a split has this column, with images or one label per image."""
    if column not in features:
        raise ValueError(f"{where} has no column {column!r}; the columns are {', '.join(features)}")
    types, what = {
        "image": (("Image",), "images"),
        "label": (("ClassLabel", "Value"), "one label per image"),
    }[kind]
    if type(features[column]).__name__ not in types:
        raise ValueError(f"{where}: column {column!r} holds {features[column]}, not {what}")


def _class_names(feature: Any, values: Sequence[Any]) -> list[str]:
    """Return the names of a ClassLabel, or the distinct values of another column, sorted."""
    names = getattr(feature, "names", None)
    return list(names) if names is not None else [str(v) for v in sorted(set(values))]


def _numbers(feature: Any, values: Sequence[Any], classes: list[str], where: str) -> list[int]:
    """Return labels as indices of the classes of their names; none if all are -1.

    Raises:
        ValueError: for a label that is not a class; it names the split and the label.
    """
    names = getattr(feature, "names", None)
    labels = {value: str(value) for value in set(values)}
    if names is not None:
        labels = {i: name for i, name in enumerate(names) if i in labels}
    numbers = {name: i for i, name in enumerate(classes)}
    known = {value: numbers[name] for value, name in labels.items() if name in numbers}
    unknown = [labels.get(value, value) for value in values if value not in known]
    if unknown and set(values) != {-1}:
        raise ValueError(
            f"{where} has the label {unknown[0]!r}, which is not a class of the training split"
        )
    return [] if unknown else [known[value] for value in values]


def _image(dataset: Any, column: str, index: int) -> Path | io.BytesIO:
    """Return an encoded image, as its bytes or the path of its file."""
    found = dataset[index][column]
    if found is None:
        raise ValueError("the dataset has no image for this row")
    return Path(found["path"]) if found["bytes"] is None else io.BytesIO(found["bytes"])
