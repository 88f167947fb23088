"""The version, apart so that a build can read it without importing PyTorch."""

__version__ = "1.0.0"
