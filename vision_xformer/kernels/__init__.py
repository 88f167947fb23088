"""One paper per file: what happens between projected queries, keys and values."""

from ..registry import import_all
from .base import KERNELS, Kernel, Site

__all__ = ["KERNELS", "Kernel", "Site"]

import_all(__name__, __path__)
