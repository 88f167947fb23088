"""One paper, one file: what happens between projected queries, keys and values."""

from . import linformer, nystrom, performer, softmax
from .base import KERNELS, Kernel

__all__ = ["KERNELS", "Kernel", "linformer", "nystrom", "performer", "softmax"]
