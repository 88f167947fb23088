"""Load weights from our checkpoints, the attention packages and other libraries."""

from .loading import LoadReport, load_weights, read_weights

__all__ = ["LoadReport", "load_weights", "read_weights"]
