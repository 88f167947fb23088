"""Memory of a process or GPU."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def reset_peak() -> int:
    """Start a new peak and return the bytes held now, by the GPU allocator or the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # The counter of the kernel: getrusage would start from the size of the parent process.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def forget_peak() -> None:
    """Start a new peak, on a system that can."""
    with contextlib.suppress(OSError, RuntimeError):
        reset_peak()


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
