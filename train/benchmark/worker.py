"""Worker process of one row: measures memory once, then times in turns."""

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

from vision_xformer.memory_use import MIB, bytes_kept

from ..measure import peak_bytes, reset_peak
from .cases import Case, Subject, build, facts
from .estimate import computed

TURN_SECONDS, MOST_STEPS = 0.5, 20  # limits of a turn
ENOUGH, LONG_SECONDS = 3, 20.0  # number of steps that suffices once they took that long
LARGE_MIB = 512.0  # peak from which a CPU process releases its memory to others after a turn
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_MOST = 2**25  # largest threshold of older versions


def _malloc(threshold: int) -> None:
    """Set the size from which glibc allocates with mmap and returns freed memory at once."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, threshold) or libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, threshold)
        libc.malloc_trim(0)


def _limit_memory() -> None:
    """Make allocations fail that would exhaust the memory of the machine."""
    # not every system supports this, and a stricter limit that is already set raises ValueError
    with contextlib.suppress(ImportError, OSError, StopIteration, ValueError):
        import resource

        limit = _kilobytes("/proc/self/status", "VmData") + _kilobytes(
            "/proc/meminfo", "MemAvailable"
        )
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit * 1024, most))


def _kilobytes(path: str, field: str) -> int:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _memory(subject: Subject, device: str) -> dict[str, Any]:
    """Measure the MiB of a training step: saved for backward, peak above the start, reserved."""
    kept = bytes_kept(subject.module, subject.forward)
    subject.step()  # loads libraries and creates the optimizer state
    found: dict[str, Any] = {"kept_mib": kept / MIB}
    if device == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, RuntimeError):  # not supported on every system
        before = reset_peak()
        subject.step()
        found["peak_mib"] = (peak_bytes() - before) / MIB
    if device == "cuda":
        found["reserved_mib"] = torch.cuda.max_memory_reserved() / MIB
        if (used := _driver_bytes()) is not None:
            found["device_mib"] = used / MIB
    return found


def _seconds(function: Callable[[], None], repeats: int, device: str) -> list[float]:
    """Time each call; on a GPU with events. All but a single CPU call follow a warm-up call."""
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


def _driver_bytes() -> int | None:
    """Return the GPU memory of this process according to the driver, if it is known."""
    with contextlib.suppress(Exception):  # nvidia-ml-py is missing or lacks permission
        import pynvml

        pynvml.nvmlInit()
        card = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(card)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid():  # not in containers with process numbers of their own
                return process.usedGpuMemory
    return None


def _is_large(row: dict[str, Any]) -> bool:
    return float(row.get("peak_mib", 0.0)) >= LARGE_MIB


def says_out_of_memory(text: str) -> bool:
    """Whether the text of an error says that memory ran out, on the GPU or the CPU."""
    words = (
        "out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed",
    )  # fmt: skip
    return any(word in text.lower() for word in words)


def _out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or says_out_of_memory(str(error))


def _end_with_parent() -> None:
    """Exit when the parent does, even in the middle of a step that takes minutes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(case: Case, device: str, threads: int, pipe: Connection) -> None:
    """Measure a case in a worker process.

    Builds the case, and runs it once on a GPU: this is slow, and all processes do it at once. Then
    waits for a message, and answers it with the memory of a step. Then receives numbers of repeats
    and answers each with the times of inference and of training steps, until it receives None. An
    error is sent as the status of the row.

    Args:
        case: case to measure.
        device: "cpu" or "cuda".
        threads: number of threads of PyTorch.
        pipe: connection to the parent process.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    known: dict[str, Any] = {}
    try:
        if device == "cpu":
            _malloc(2**16)  # makes resident memory follow the size of the tensors
            _limit_memory()
        known = facts(case) | computed(case, device)
        subject = build(case, device)
        if device == "cuda":  # loads libraries and compiles kernels
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in each process
            subject.step()
            torch.cuda.empty_cache()
        pipe.recv()
        if device == "cpu":
            _limit_memory()  # available memory may have changed
        memory = _memory(subject, device)
        pipe.send(known | memory | {"status": "ok"})
        while (repeats := pipe.recv()) is not None:
            if device == "cpu":
                _limit_memory()
            times = [_seconds(f, repeats, device) for f in (subject.infer, subject.step)]
            if device == "cuda":
                torch.cuda.empty_cache()  # leaves memory to the other processes
            elif repeats == 0 or _is_large(memory):
                _malloc(2**30)  # trims; later steps reuse memory instead of mapping it
            pipe.send(times)
    except (EOFError, ConnectionError):  # the parent process has ended
        return
    except Exception as error:  # any error of a mixer becomes the status of its row
        first = str(error).strip().split("\n")[0] or type(error).__name__
        pipe.send(known | {"status": "out of memory" if _out_of_memory(error) else first})


class Worker:
    """A case that is measured in its own process.

    Args:
        case: case to measure.
        device: "cpu" or "cuda".

    Attributes:
        row: columns that are known so far.
        seconds: times of inference and of training steps.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.row = case, dict(vars(case))
        self.seconds: tuple[list[float], list[float]] = ([], [])
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (case, device, torch.get_num_threads(), theirs)
        self.process = context.Process(target=work, args=arguments)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()

    def prepare(self) -> None:
        """Measure the memory of a step, then let the process release unused memory."""
        self._tell(True)
        self.row |= self._receive()
        if not self.alive:
            self.process.join()
            return
        self._ask(0)

    @property
    def alive(self) -> bool:
        """Whether no error has occurred so far."""
        return bool(self.row["status"] == "ok")

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):  # the process has ended
            self.process.join()
            return {"status": f"the process ended with {self.process.exitcode}"}

    def _tell(self, message: Any) -> None:
        with contextlib.suppress(ConnectionError):  # the reason is received next
            self.pipe.send(message)

    def _ask(self, repeats: int) -> None:
        """Request the times of ``repeats`` steps."""
        self._tell(repeats)
        found = self._receive()
        if isinstance(found, dict):
            self.row |= found
            return
        for times, more in zip(self.seconds, found, strict=True):
            times += more

    @property
    def wants_turns(self) -> bool:
        """Whether more steps are needed; a few long ones suffice."""
        steps = self.seconds[1]
        return self.alive and (len(steps) < ENOUGH or sum(steps) < LONG_SECONDS)

    def turn(self) -> None:
        """Time about as many steps as fit into a turn, but at least one.

        A large case takes at least ``ENOUGH`` steps to justify the warm-up of its turn.
        """
        last = self.seconds[1][-1] if self.seconds[1] else TURN_SECONDS
        least = ENOUGH if _is_large(self.row) else 1
        self._ask(max(least, min(MOST_STEPS, int(TURN_SECONDS / last))))

    def close(self) -> dict[str, Any]:
        """End the process and return the complete row."""
        if self.process.is_alive():
            self._tell(None)
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
        """Terminate the process if it is still running."""
        self.process.terminate()
        self.process.join()
