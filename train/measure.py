"""Memory of a process or GPU, and time of training steps."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


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


def step_seconds(
    models: Mapping[str, nn.Module], images: Tensor, autocast: Any, rounds: int
) -> dict[str, float]:
    """The median time in seconds of a forward and a backward pass of each model.

    The models take turns; a first turn is not counted.

    Args:
        models: models by name.
        images: a batch (B, C, H, W), on the device where the models run.
        autocast: context of the forward passes.
        rounds: turns that are counted.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(rounds + 1), desc="time", unit="round", leave=False, disable=None):
        for name, model in models.items():
            times[name].append(_seconds(model.to(images.device), images, autocast))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def _seconds(model: nn.Module, images: Tensor, autocast: Any) -> float:
    device = images.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with autocast:
        loss = model(images).float().logsumexp(1).mean()
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - start
    model.zero_grad()
    return taken


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {field}")
