"""What is measured the same way everywhere: bytes kept for backward, memory of a process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def bytes_kept(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and buffers apart.

    Each storage counts once, as a whole: a view keeps all of what it views.
    """
    held: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # an output that held itself would never be freed
        held.append(weakref.ref(alone))
        return alone

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward()
    # those of a branch that the output does not need are gone already
    tensors = [tensor for reference in held if (tensor := reference()) is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    del output  # alive until here, so that no address was used twice
    for own in (*module.parameters(), *module.buffers()):
        storages.pop(own.untyped_storage().data_ptr(), None)
    return sum(storages.values())


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
