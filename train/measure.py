"""Memory of a process or GPU, and bytes stored for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def bytes_kept(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Count the bytes that a forward pass stores for the backward pass.

    Parameters and buffers are not counted. Each storage counts once and completely: a view stores
    all of its base.
    """
    held: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # an output that held itself would never be freed
        held.append(weakref.ref(alone))
        return alone

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward()
    # those of a branch that the output does not need are already freed
    tensors = [tensor for reference in held if (tensor := reference()) is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    del output  # alive until here, so that no address is reused
    for own in (*module.parameters(), *module.buffers()):
        storages.pop(own.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def reset_peak() -> int:
    """Start a new peak and return the bytes held now, by the GPU allocator or the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # The counter of the kernel: getrusage would start from the size of the parent process.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def peak_bytes() -> int:
    """The peak bytes since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def known_peak() -> int | None:
    """The peak bytes of the process so far; None on a system that does not report it."""
    try:
        return peak_bytes()
    except (OSError, RuntimeError):
        return None


def peak_text() -> str:
    """The peak memory so far in MiB, for a progress bar; empty on a system that does not say."""
    peak = known_peak()
    return "" if peak is None else f", {peak / 2**20:.0f} MiB"


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {field}")
