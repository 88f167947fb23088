"""Folders of image files, one folder per class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..config import DataConfig
from .files import SPLIT_NAMES, is_image, left_out_note, list_images, shorten, visible
from .images import Sample
from .registry import Source, register

_RIGHT = "train, val (or valid, or validation) and test"


@register("imagefolder")
def read_image_folder(config: DataConfig) -> Source:
    """Read ``root/train/CLASS/*``, ``root/val`` and ``root/test``, or ``root/CLASS/*`` alone.

    Images in subfolders of a class folder belong to that class. The validation folder may also be
    named "valid" or "validation"; without ``root/test``, it is the test set.

    Raises:
        ValueError: if a folder is missing, empty or unknown, or if another set has classes that the
            training set lacks.
    """
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder")
    folders, left_out = _split_folders(root), Counter[str]()
    train, classes = _class_folders(folders.pop("train"), left_out)
    held_out = [
        _held_out(folders[part], classes, left_out) for part in ("test", "val") if part in folders
    ]
    test, val = [*held_out, [], []][:2]
    return Source(train, classes, test=test, val=val, notes=left_out_note(root, left_out))


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of "train", "val" and "test"; root itself if it has none of them."""
    found: dict[str, Path] = {}
    names = _folders(root)
    known = [name for name in names if name.lower() in SPLIT_NAMES]
    if not known:
        return {"train": root}
    way_out = "if these are classes, move all class folders into a folder train"
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{root} has {shorten(unknown)} next to {', '.join(known)}: name the folders {_RIGHT}; "
            f"{way_out}"
        )
    for name in known:
        part = SPLIT_NAMES[name.lower()]
        if part in found:
            raise ValueError(f"{root} has both {found[part].name} and {name}: keep one of them")
        found[part] = root / name
    if "train" not in found:
        raise ValueError(f"{root} has {', '.join(known)} but no folder train; {way_out}")
    return found


def _folders(root: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted."""
    return sorted(p.name for p in root.iterdir() if visible(p.name) and p.is_dir())


def _count_loose(root: Path, left_out: Counter[str]) -> None:
    """Count the images next to the class folders, which belong to no class."""
    for path in root.iterdir():
        if visible(path.name) and is_image(path.name) and not path.is_dir():
            left_out["images outside the class folders"] += 1


def _class_folders(root: Path, left_out: Counter[str]) -> tuple[list[Sample], list[str]]:
    """Return the images in the class folders and the names of the classes, sorted."""
    classes = _folders(root)
    if len(classes) < 2:
        raise ValueError(f"{root} must have folders of at least 2 classes, not {classes}")
    _count_loose(root, left_out)
    samples: list[Sample] = []
    for label, name in enumerate(classes):
        before = left_out.copy()
        files = list_images(root / name, left_out)
        if not files:
            others = left_out_note(root / name, left_out - before)
            hint = f" ({others[0]})" if others else ""
            raise ValueError(f"there are no images in the class folder {root / name}{hint}")
        samples += [(path, label) for path in files]
    return samples, classes


def _held_out(root: Path, classes: list[str], left_out: Counter[str]) -> list[Sample]:
    """Return the images of a validation or test folder, which need not have all classes."""
    unknown = sorted(set(_folders(root)) - set(classes))
    if unknown:
        raise ValueError(
            f"{root} has class folders that the training set does not have: {shorten(unknown)}"
        )
    _count_loose(root, left_out)
    samples: list[Sample] = [
        (path, label)
        for label, name in enumerate(classes)
        if (root / name).is_dir()
        for path in list_images(root / name, left_out)
    ]
    if not samples:
        raise ValueError(f"there are no images in the class folders of {root}")
    return samples
