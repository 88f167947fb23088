"""Temporary evaluation mode, and a check for models without values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the context, and restore the mode of each submodule after it."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_values(model: nn.Module, name: str) -> None:
    """Raise a ValueError for a model with parameters or buffers on the meta device."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{name} is on the meta device: its weights have no values")
