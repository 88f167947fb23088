"""One paper, one file: what happens between projected queries, keys and values."""

from ..registry import import_all
from .base import KERNELS, Kernel

__all__ = ["KERNELS", "Kernel"]

import_all(__name__, __path__)
