"""Temporary evaluation mode, models inside wrappers, and a check for models without values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile or a wrapper for data-parallel training."""
    inner: Any = model
    while isinstance(inner, _WRAPPERS) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


def check_values(model: nn.Module, name: str) -> None:
    """Raise a ValueError for a model with parameters or buffers on the meta device."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{name} is on the meta device: its weights have no values")
