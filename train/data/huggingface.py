"""Datasets of Hugging Face, from a folder written by ``save_to_disk``."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, Literal

from vision_xformer.options import check_options

from ..config import DataConfig
from .images import Sample, as_items, count_channels
from .registry import Source, parse_options, register

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
LABELS = ("label", "labels")  # names of columns with a label, if none is a ClassLabel


@register("huggingface", argument="[:image=COLUMN][:label=COLUMN]")
def read_huggingface(config: DataConfig) -> Source:
    """Read a ``Dataset`` or ``DatasetDict`` with an image column and a label column.

    Nothing is downloaded. Columns are found by their type; if there are several, name them:
    ``huggingface:label=fine_label``. A validation split is the test set if there is no other.

    Raises:
        ValueError: if ``datasets`` is not installed, if ``data.root`` is not such a folder, or if
            the columns of the image and the label are ambiguous.
    """
    parts = _load(Path(config.root).expanduser())
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    train = parts["train"]
    columns = parse_options(config.name.split(":")[1:])
    check_options("huggingface", columns, ("image", "label"))
    image = _find_column(train, "image", columns.get("image"))
    label = _find_column(train, "label", columns.get("label"))
    classes = _class_names(train, label)
    parts = {part: found.select_columns([image, label]) for part, found in parts.items()}
    encoded = type(train.features[image])(decode=False)  # our reader decodes all images
    images = {
        part: functools.partial(_image, found.cast_column(image, encoded), image)
        for part, found in parts.items()
    }
    channels = count_channels(images["train"], len(train))
    samples: dict[str, list[Sample]] = {
        part: as_items(images[part], _labels(found, label, classes))
        for part, found in parts.items()
    }
    return Source(
        samples["train"],
        classes,
        test=samples.get("test", []),
        val=samples.get("val", []),
        channels=channels,
    )


def _load(root: Path) -> dict[str, Any]:
    """Return the splits "train", "val" and "test", as far as the folder has them."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data.name huggingface needs the package datasets: pip install datasets"
        ) from error
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder")
    try:
        loaded = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{root} is not a folder written by save_to_disk of a Dataset or DatasetDict: {error}"
        ) from error
    if not isinstance(loaded, dict):
        return {"train": loaded}
    parts = {
        part: loaded[name] for part, names in SPLITS.items() for name in names if name in loaded
    }
    if "train" not in parts:
        raise ValueError(f"{root} has no split 'train', only {', '.join(loaded) or 'none'}")
    return parts


def _find_column(dataset: Any, kind: Literal["image", "label"], name: str | int | None) -> str:
    """Return the column with the images or labels: the one named, or the only one of its type."""
    features = dataset.features
    if name is not None:
        if name not in features:
            raise ValueError(f"no column {name!r}; the columns are {', '.join(features)}")
        if kind == "image" and type(features[name]).__name__ != "Image":
            raise ValueError(f"column {name!r} holds {features[name]}, not images")
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


def _class_names(dataset: Any, label: str) -> list[str]:
    """Return the names of a ClassLabel, or the distinct values of another column, sorted."""
    names = getattr(dataset.features[label], "names", None)
    return list(names) if names is not None else [str(v) for v in sorted(set(dataset[label]))]


def _labels(dataset: Any, label: str, classes: list[str]) -> list[int]:
    """Return the labels as indices of classes; -1 for a value that is not one of them."""
    if getattr(dataset.features[label], "names", None) is not None:
        return list(dataset[label])
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers.get(str(value), -1) for value in dataset[label]]


def _image(dataset: Any, column: str, index: int) -> Path | io.BytesIO:
    """Return an encoded image, as its bytes or the path of its file."""
    found = dataset[index][column]
    if found is None:
        raise ValueError("the dataset has no image for this row")
    return Path(found["path"]) if found["bytes"] is None else io.BytesIO(found["bytes"])
