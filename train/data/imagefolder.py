"""Folders of image files, one folder per class."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from .images import Sample, list_images
from .registry import Source, register


@register("imagefolder")
def read_image_folder(config: DataConfig) -> Source:
    """Read ``root/train/CLASS/*``, ``root/val`` and ``root/test``, or ``root/CLASS/*`` alone.

    Without ``root/test``, ``root/val`` is the test set.

    Raises:
        ValueError: if a folder is missing or empty, or if the class folders differ.
    """
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder")
    if not (root / "train").is_dir():
        return Source(*_class_folders(root))
    train, classes = _class_folders(root / "train")
    held_out = [
        _class_folders(root / name, classes)[0]
        for name in ("test", "val")
        if (root / name).is_dir()
    ]
    test, val = [*held_out, [], []][:2]
    return Source(train, classes, test=test, val=val)


def _class_folders(root: Path, expected: list[str] | None = None) -> tuple[list[Sample], list[str]]:
    """Return the images in the class folders and the names of the classes, sorted."""
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
        files = list_images(root / name)
        if not files:
            raise ValueError(
                f"no images in the class folder {root / name} (its subfolders are not searched)"
            )
        samples += [(path, label) for path in files]
    return samples, classes
