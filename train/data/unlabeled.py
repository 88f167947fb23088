"""A folder of images without labels, for training without labels."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from .files import list_images
from .registry import Source, register


@register("unlabeled")
def read_unlabeled(config: DataConfig) -> Source:
    """Read all images in ``root`` and its subfolders, as one class.

    Raises:
        ValueError: if ``root`` is not a folder, or has no images.
    """
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder")
    files = list_images(root)
    if not files:
        raise ValueError(f"there are no images in {root} or its subfolders")
    return Source([(path, 0) for path in files], ["unlabeled"])
