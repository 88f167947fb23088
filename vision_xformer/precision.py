"""The type that sums are accumulated in, and products that autocast leaves alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def has_bf16(device: str) -> bool:
    """Whether a device, "cpu" or "cuda", computes in bfloat16 natively."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # a function of newer PyTorch only
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
