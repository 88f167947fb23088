"""Load weights from our checkpoints, the attention packages and other libraries."""

from .files import read_metadata, read_weights
from .loading import LoadReport, load_weights

__all__ = ["LoadReport", "load_weights", "read_metadata", "read_weights"]
