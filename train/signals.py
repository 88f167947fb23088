"""Ctrl-C and SIGTERM: a program ends with one line, a run after the current step with its state.

This module imports nothing that takes time, so that programs can use it before their other imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

_KINDS = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], None]


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal asked the run to stop; its state is saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_at_once() -> None:
    """From now on, a signal ends the process without a traceback: for imports and for the end."""
    for kind in _KINDS:
        signal.signal(kind, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")  # print() may have been interrupted
    os._exit(128 + number)  # imports may turn an exception into another one


@contextlib.contextmanager
def _handled(handler: _Handler) -> Iterator[None]:
    """Set a handler for the signals; other threads than the main one never receive any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, handler) for kind in _KINDS}
    try:
        yield
    finally:
        for kind, previous in before.items():
            signal.signal(kind, previous)


def raised() -> contextlib.AbstractContextManager[None]:
    """Context in which a signal raises KeyboardInterrupt with its number, see :func:`exit_code`."""
    return _handled(_raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a program that a signal stopped: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Context in which signals wait; processes that start in it never receive any."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _KINDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Signals:
    """Context in which a signal is noted; a second one raises KeyboardInterrupt.

    Args:
        accelerator: of the run, whose processes stop after the same step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._number: int | None = None

    def __enter__(self) -> Signals:
        self._handled = _handled(self._note)
        self._handled.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handled.__exit__(*error)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            raise KeyboardInterrupt(number)
        self._number = number

    def received(self) -> int | None:
        """The number of a signal that reached any of the processes."""
        if self.accelerator.num_processes == 1:
            return self._number
        import torch

        number = torch.tensor([self._number or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(number).max()) or None
