"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from ..config import DataConfig
from .registry import Source, register


@register("digits")
def read_digits(config: DataConfig) -> Source:
    """Return 1,797 handwritten digits of 8 x 8 pixels (UCI)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    return Source(
        train=list(zip(images, map(int, digits.target), strict=True)),
        classes=[str(name) for name in digits.target_names],
        image_size=8,
        channels=1,
        mirror=False,
    )
