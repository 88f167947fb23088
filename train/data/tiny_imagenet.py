"""Tiny ImageNet in its original layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from ..config import DataConfig
from .archives import ENDINGS, unpack
from .files import list_images
from .images import Sample
from .registry import Source, register

FOLDER = "tiny-imagenet-200"


@register("tiny_imagenet")
def read_tiny_imagenet(config: DataConfig) -> Source:
    """Return 200 classes of 64 x 64 pixels, from a folder or an archive in ``data.root``.

    The labels of the test images are not public, so the 10,000 validation images are the test set.

    Raises:
        ValueError: if a file is missing or inconsistent; it names the file.
    """
    root = _find_folder(Path(config.root).expanduser())
    for name in ("wnids.txt", "val/val_annotations.txt"):
        if not (root / name).is_file():
            raise ValueError(f"no Tiny ImageNet in {root}: {name} is missing")
    wnids = (root / "wnids.txt").read_text(encoding="utf-8-sig").split()
    labels = {wnid: i for i, wnid in enumerate(wnids)}
    if len(labels) != len(wnids) or len(wnids) < 2:
        raise ValueError(f"{root / 'wnids.txt'} must list 2 or more classes, each once")
    train: list[Sample] = []
    for wnid, label in labels.items():
        files = list_images(root / "train" / wnid / "images")
        if not files:
            raise ValueError(f"no training images of class {wnid} in {root / 'train' / wnid}")
        train += [(path, label) for path in files]
    return Source(train, _class_names(root, wnids), image_size=64, test=_test_images(root, labels))


def _find_folder(root: Path) -> Path:
    """Return the folder with the images; unpack an archive next to it if there is only that."""
    if (root / "wnids.txt").is_file():
        return root
    folder = root / FOLDER
    found = sorted(root.glob(f"{FOLDER}*.*")) if root.is_dir() else []
    archives = [path for path in found if path.name.lower().endswith(ENDINGS)]
    if not folder.is_dir() and archives:
        with FileLock(root / f".{FOLDER}.lock"):  # of several processes, one unpacks
            if not folder.is_dir():
                _unpack(archives[0], folder)
    return folder if folder.is_dir() else root


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive of the folder, or of what is in it."""
    unpacked = folder.with_name(f".{folder.name}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)  # of a process that was killed
    unpack(archive, unpacked)
    inner = unpacked / FOLDER
    (inner if inner.is_dir() else unpacked).rename(folder)
    shutil.rmtree(unpacked, ignore_errors=True)


def _test_images(root: Path, labels: dict[str, int]) -> list[Sample]:
    test: list[Sample] = []
    for line in (root / "val" / "val_annotations.txt").read_text(encoding="utf-8-sig").splitlines():
        file, wnid, *_ = [*line.split("\t"), ""]
        path = root / "val" / "images" / file
        if wnid not in labels:
            raise ValueError(f"val_annotations.txt in {root}: class {wnid!r} is not in wnids.txt")
        if not path.is_file():
            raise ValueError(f"val_annotations.txt in {root} lists {file}, which is missing")
        test.append((path, labels[wnid]))
    if not test:
        raise ValueError(f"{root / 'val' / 'val_annotations.txt'} is empty")
    return test


def _class_names(root: Path, wnids: list[str]) -> list[str]:
    """Return each class's first name in words.txt; if two share it, the id is added."""
    words = root / "words.txt"  # each line: id, tab, names
    text = words.read_text(encoding="utf-8-sig", errors="replace") if words.is_file() else ""
    lines = text.splitlines()
    names = {wnid: name.split(",")[0] for wnid, _, name in (line.partition("\t") for line in lines)}
    classes = [names.get(wnid, wnid) for wnid in wnids]
    return [f"{c} {w}" if classes.count(c) > 1 else c for c, w in zip(classes, wnids, strict=True)]
