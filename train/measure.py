"""What is measured the same way everywhere: bytes kept for backward, memory of a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def bytes_kept(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and buffers apart.

    Each storage counts once, as a whole: a view keeps all of what it views.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would keep itself: a cycle that is never freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward()
    total = sum(kept.values())
    del output  # alive until here, so that no address was used twice
    return total


def reset_peak() -> int:
    """Start a new peak; returns the bytes held now, of the GPU's allocator or of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # The kernel's own counter: getrusage would begin at the size of the process that started us.
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Most bytes held since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def known_peak() -> int | None:
    """Most bytes held by the process so far; None on a system that does not say."""
    try:
        return peak_bytes()
    except (OSError, RuntimeError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {field}")
