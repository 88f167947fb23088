"""One paper per file: what happens between projected queries, keys and values."""

from ..registry import import_all
from .base import KERNELS, Kernel, Site, ValuePath, merge_heads, split_heads

__all__ = ["KERNELS", "Kernel", "Site", "ValuePath", "merge_heads", "split_heads"]

import_all(__name__, __path__)
