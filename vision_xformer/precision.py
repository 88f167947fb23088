"""The type that sums are accumulated in, and products that autocast leaves alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def to_accumulate(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast each tensor to at least float32; float64 stays float64. Shapes are unchanged."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of ``x``, a tensor of any shape."""
    if x.is_meta:  # which has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of ``x``, a tensor of any shape."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
