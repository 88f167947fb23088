"""Pixels to tokens: (B, C, *shape) -> (B, N, D) for signals, images and volumes."""

from ..registry import import_all
from .base import STEMS, Stem, check_input_shape, patch_grid

__all__ = ["STEMS", "Stem", "check_input_shape", "patch_grid"]

import_all(__name__, __path__)
