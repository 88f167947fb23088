"""Ctrl-C and SIGTERM end a run after the current step, with its state saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal asked the run to stop; its state is saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Signals:
    """Context in which a signal is noted; a second one raises KeyboardInterrupt.

    Args:
        accelerator: of the run, whose processes stop after the same step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._number: int | None = None

    def __enter__(self) -> Signals:
        kinds = (signal.SIGINT, signal.SIGTERM)
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *_: Any) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            raise KeyboardInterrupt
        self._number = number

    def received(self) -> int | None:
        """The number of a signal that reached any of the processes."""
        if self.accelerator.num_processes == 1:
            return self._number
        number = torch.tensor([self._number or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(number).max()) or None
