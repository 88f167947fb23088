"""Summaries of the data for the user: broken images, and the number of images per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .files import SHOWN, shorten
from .images import Broken, Images
from .registry import Source


def list_broken(broken: Broken) -> str:
    """Return the reasons why images cannot be read: the first ten, and the number of others."""
    errors = [str(error) for error in broken.values()]
    count = f"{len(errors):,} images: " if len(errors) > 1 else ""
    return count + shorten(errors, "; ")


def without(source: Source, broken: Broken) -> Source:
    """Return a source without images that cannot be read.

    Raises:
        ValueError: if one of its sets has no other images.
    """
    kept: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        part = getattr(source, name)
        kept[name] = [sample for sample in part if sample[0] not in broken]
        if part and not kept[name]:
            raise ValueError(f"no image in the {name} set can be read: {list_broken(broken)}")
    return source._replace(**kept)


def count_classes(parts: Sequence[Images], classes: Sequence[str]) -> list[str]:
    """Return a line per set with its images per class, and a warning if it lacks classes.

    Args:
        parts: the training, validation and test images.
        classes: names of all classes.
    """
    lines = []
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        counts = torch.bincount(part.labels.cpu(), minlength=len(classes)).tolist()
        named = list(zip(counts, classes, strict=True))
        if len(classes) <= SHOWN:
            found = ", ".join(f"{label} {count:,}" for count, label in named)
        else:
            (fewest, rare), (most, frequent) = min(named), max(named)
            found = f"{len(classes):,} classes, {fewest:,} ({rare}) to {most:,} ({frequent}) each"
        lines.append(f"{name}: {len(part):,} images ({found})")
        if absent := [label for count, label in named if count == 0]:
            lines.append(f"warning: {name} has no images of {shorten(absent)}")
    return lines
