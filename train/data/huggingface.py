"""Hugging Face datasets, from a folder written by ``save_to_disk`` or streamed."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from vision_xformer.options import check_options

from ..config import DataConfig
from .images import Item, count_item_channels
from .registry import Source, parse_options, register
from .streaming import Streams

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
LABELS = ("label", "labels")  # names of columns with a label, if none is a ClassLabel


@register("huggingface", argument="[:OPTION=VALUE]")
def read_huggingface(config: DataConfig) -> Source:
    """Read the splits of a dataset with an image column and a label column.

    ``data.root`` is a folder written by ``save_to_disk``; nothing is downloaded. With
    ``huggingface:streaming=true`` it is a folder of Parquet or Arrow files or a name on the Hub,
    from which a few files at a time are copied to this machine. Columns are found by their type; if
    there are several, name them: ``huggingface:label=fine_label``. The validation split is
    the test set if there is no test split or all of its labels are -1, that is, not public.

    Raises:
        ValueError: if ``datasets`` is not installed, if ``data.root`` is not such a folder, or if
            the columns of the image and the label are ambiguous.
    """
    library = _library()
    options = parse_options(config.name.split(":")[1:])
    check_options("huggingface", options, ("image", "label", "streaming", "config"))
    read: Callable[[Any, str, str], tuple[list[Item], list[Any]]] = _read_saved
    if options.get("streaming") == "true":
        streams = Streams(library, config.root, options.get("config"))
        splits, read = streams.splits, streams.read
    elif {"streaming", "config"} & options.keys():
        raise ValueError("data.name: streaming must be true, and config needs streaming=true")
    else:
        splits = _load(library, Path(config.root).expanduser())
    parts = _parts(splits, config.root)
    features = parts["train"].features
    image = _find_column(features, "image", options.get("image"))
    label = _find_column(features, "label", options.get("label"))
    found = {part: read(split, image, label) for part, split in parts.items()}
    if "test" in found and set(found["test"][1]) == {-1}:
        del found["test"]
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    classes = _class_names(features[label], found["train"][1])
    samples = {
        part: list(zip(items, _numbers(features[label], values, classes), strict=True))
        for part, (items, values) in found.items()
    }
    return Source(
        samples["train"],
        classes,
        test=samples.get("test", []),
        val=samples.get("val", []),
        channels=count_item_channels(samples["train"]),
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
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{root} is not a folder written by save_to_disk of a Dataset or DatasetDict: {error}"
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _parts(splits: dict[str, Any], root: str) -> dict[str, Any]:
    """Return those of the splits "train", "val" and "test" that exist."""
    parts = {
        part: splits[name] for part, names in SPLITS.items() for name in names if name in splits
    }
    if "train" not in parts:
        raise ValueError(f"{root} has no split 'train', only {', '.join(splits) or 'none'}")
    return parts


def _read_saved(dataset: Any, image: str, label: str) -> tuple[list[Item], list[Any]]:
    """Return the images and labels of a split that is on this machine."""
    encoded = type(dataset.features[image])(decode=False)  # our reader decodes all images
    images = dataset.select_columns([image]).cast_column(image, encoded)
    read = functools.partial(_image, images, image)
    labels = list(dataset[label])
    if None in labels:
        raise ValueError(f"row {labels.index(None)} of the dataset has no {label}")
    return [Item(read, i) for i in range(len(dataset))], labels


def _find_column(features: Any, kind: Literal["image", "label"], name: str | int | None) -> str:
    """Return the column with the images or labels: the one named, or the only one of its type."""
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


def _class_names(feature: Any, values: Sequence[Any]) -> list[str]:
    """Return the names of a ClassLabel, or the distinct values of another column, sorted."""
    names = getattr(feature, "names", None)
    return list(names) if names is not None else [str(v) for v in sorted(set(values))]


def _numbers(feature: Any, values: Sequence[Any], classes: list[str]) -> list[int]:
    """Return labels as indices of classes; -1 for a value that is not one of them."""
    if getattr(feature, "names", None) is not None:
        return list(values)
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers.get(str(value), -1) for value in values]


def _image(dataset: Any, column: str, index: int) -> Path | io.BytesIO:
    """Return an encoded image, as its bytes or the path of its file."""
    found = dataset[index][column]
    if found is None:
        raise ValueError("the dataset has no image for this row")
    return Path(found["path"]) if found["bytes"] is None else io.BytesIO(found["bytes"])
