"""CIFAR-10 and CIFAR-100, checked against the authors' checksums."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from ..config import DataConfig
from .images import Sample
from .registry import Source, register


@register("cifar10")
def read_cifar10(config: DataConfig) -> Source:
    """Return CIFAR-10: 60,000 images of 32 x 32 pixels; see :func:`read_cifar`."""
    return read_cifar(config, CIFAR10)


@register("cifar100")
def read_cifar100(config: DataConfig) -> Source:
    """Return CIFAR-100: 60,000 images of 32 x 32 pixels; see :func:`read_cifar`."""
    return read_cifar(config, CIFAR100)


def read_cifar(config: DataConfig, dataset: type[CIFAR10]) -> Source:
    """Read one of torchvision's two datasets, and download it if it is missing.

    Raises:
        ValueError: if the files are incomplete or cannot be downloaded.
    """
    root = Path(config.root).expanduser()
    folder = root / dataset.base_folder
    if not folder.exists() and (root / "train").is_dir():
        raise ValueError(
            f"{root} has no {dataset.base_folder}; it looks like an image folder: use "
            "--data.name imagefolder"
        )
    if config.mirror is not None:
        url = f"{config.mirror.rstrip('/')}/{dataset.filename}"
        dataset = type(dataset.__name__, (dataset,), {"url": url})
    download = not folder.exists()
    try:
        sets = [dataset(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, EOFError) as error:
        problem = (
            f"and it could not be downloaded: {error}"
            if download
            else "which is incomplete: if you remove it, it is downloaded again"
        )
        raise ValueError(
            f"{root} has no complete {config.name} (expected {folder}, as unpacked from "
            f"{dataset.filename}), {problem}"
        ) from error
    train, test = map(_samples, sets)
    return Source(train, list(sets[0].classes), image_size=32, test=test)


def _samples(dataset: CIFAR10) -> list[Sample]:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    return list(zip(images, dataset.targets, strict=True))
