"""The process of one row: its memory once, then its times, a turn at a time."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..measure import bytes_kept, peak_bytes, reset_peak
from .cases import Case, Subject, build, facts

MIB = 2**20
TURN_SECONDS, MOST_STEPS = 0.5, 20  # of a turn
ENOUGH, LONG_SECONDS = 3, 20.0  # steps, once those took that long
LARGE_MIB = 512.0  # from which a CPU process gives memory back after its turn: others need it
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_MOST = 2**25  # that older versions take


def _malloc(threshold: int) -> None:
    """From which size glibc maps memory for a tensor and gives it back when it is freed."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, threshold) or libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, threshold)
        libc.malloc_trim(0)


def _limit_memory() -> None:
    """Let an allocation fail where it would have another process killed."""
    # not every system has these, and one that is stricter already says ValueError
    with contextlib.suppress(ImportError, OSError, StopIteration, ValueError):
        import resource

        limit = _kilobytes("/proc/self/status", "VmData") + _kilobytes(
            "/proc/meminfo", "MemAvailable"
        )
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit * 1024, most))


def _kilobytes(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _memory(subject: Subject, device: str) -> dict[str, Any]:
    """MiB of a training step: kept for backward, peak above what was there before, reserved."""
    kept = bytes_kept(subject.module, subject.forward)
    subject.step()  # libraries are loaded, the optimiser has its state
    found: dict[str, Any] = {"kept_mib": kept / MIB}
    if device == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, RuntimeError):  # not every system says
        before = reset_peak()
        subject.step()
        found["peak_mib"] = (peak_bytes() - before) / MIB
    if device == "cuda":
        found["reserved_mib"] = torch.cuda.max_memory_reserved() / MIB
    return found


def _seconds(function: Callable[[], None], repeats: int, device: str) -> list[float]:
    """Of each call; on a GPU by its own events. Short ones begin with one that does not count."""
    if repeats > 1 or (repeats and device == "cuda"):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            function()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found


def _device_bytes() -> int | None:
    """What all processes hold of the GPU, as its driver says; None where that cannot be asked."""
    try:
        return torch.cuda.device_memory_used(0)
    except Exception:  # no nvidia-ml-py, or what it raises where it may not ask
        return None


def _is_large(row: dict[str, Any]) -> bool:
    return float(row.get("peak_mib", 0.0)) >= LARGE_MIB


def _out_of_memory(error: BaseException) -> bool:
    words = (
        "out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed",
    )  # fmt: skip
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        word in str(error).lower() for word in words
    )


def _end_with_parent() -> None:
    """End in the middle of a step, which may take minutes, once nobody waits for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(case: Case, device: str, threads: int, pipe: Connection) -> None:
    """Send what the case costs in memory, then for each number of repeats received the times."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        if device == "cpu":
            _malloc(2**16)  # so that the process is as large as its tensors
            _limit_memory()
        known = facts(case)
        subject = build(case, device)
        memory = _memory(subject, device)
        pipe.send(known | memory | {"status": "ok"})
        while (repeats := pipe.recv()) is not None:
            if device == "cpu":
                _limit_memory()  # the others may hold more than before
            times = [_seconds(f, repeats, device) for f in (subject.infer, subject.step)]
            if device == "cuda":
                torch.cuda.empty_cache()  # for the others
            elif repeats == 0 or _is_large(memory):
                _malloc(2**30)  # gives back; from now on memory is not mapped anew in each step
            pipe.send(times)
    except (EOFError, ConnectionError):  # who asked is gone
        return
    except Exception as error:  # whatever a mixer may raise is a row that says so
        first = str(error).strip().split("\n")[0] or type(error).__name__
        pipe.send({"status": "out of memory" if _out_of_memory(error) else first})


class Worker:
    """A case in a process of its own. ``row`` is what is known of it so far."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.row = case, dict(vars(case))
        self.seconds: tuple[list[float], list[float]] = ([], [])
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (case, device, torch.get_num_threads(), theirs)
        self.process = context.Process(target=work, args=arguments)
        self.held = _device_bytes() if device == "cuda" else None
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asked
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()

    def prepare(self) -> None:
        """Wait for what the case costs in memory; then it may give back what it does not need."""
        self.row |= self._receive()
        if not self.alive:
            self.process.join()
            return
        after = None if self.held is None else _device_bytes()
        if self.held is not None and after is not None:
            self.row["device_mib"] = (after - self.held) / MIB
        self._ask(0)

    @property
    def alive(self) -> bool:
        return bool(self.row["status"] == "ok")

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):  # the process is gone
            self.process.join()
            return {"status": f"the process ended with {self.process.exitcode}"}

    def _ask(self, repeats: int) -> None:
        """Have steps timed."""
        with contextlib.suppress(ConnectionError):  # what became of it is in what it sent
            self.pipe.send(repeats)
        found = self._receive()
        if isinstance(found, dict):
            self.row |= found
            return
        for times, more in zip(self.seconds, found, strict=True):
            times += more

    @property
    def wants_turns(self) -> bool:
        """Whether more steps would say more: not where a few took long already."""
        steps = self.seconds[1]
        return self.alive and (len(steps) < ENOUGH or sum(steps) < LONG_SECONDS)

    def turn(self) -> None:
        """Time as many steps as about fit into a turn, at least one; of a large case ``ENOUGH``,
        since its turn begins with steps that do not count."""
        last = self.seconds[1][-1] if self.seconds[1] else TURN_SECONDS
        least = ENOUGH if _is_large(self.row) else 1
        self._ask(max(least, min(MOST_STEPS, int(TURN_SECONDS / last))))

    def close(self) -> dict[str, Any]:
        """End the process; the whole row."""
        if self.process.is_alive():
            with contextlib.suppress(ConnectionError):
                self.pipe.send(None)
        self.process.join()
        if self.alive and self.seconds[1]:
            for name, times in zip(("infer", "step"), self.seconds, strict=True):
                cuts = times * 9
                if len(times) > 1:
                    cuts = statistics.quantiles(times, n=10, method="inclusive")
                for percent in (20, 50, 80):
                    self.row[f"{name}_ms_p{percent}"] = cuts[percent // 10 - 1] * 1e3
            p20, p50, p80 = (self.row[f"step_ms_p{p}"] for p in (20, 50, 80))
            self.row["images_per_second"] = self.case.batch / p50 * 1e3
            self.row["spread"] = (p80 - p20) / p50
        return self.row

    def stop(self) -> None:
        """End the process at once, if it still runs."""
        self.process.terminate()
        self.process.join()
