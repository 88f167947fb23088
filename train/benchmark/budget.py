"""The minutes of a call: what is expected not to fit into the rest is left to the next call."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence

from .cases import Case
from .measuring import at_once

GUESSES = {"eager": 6.0, "compiled": 25.0}  # seconds of a case, before any has been measured
MARGIN = 1.5


class Budget:
    """Time left of a call, and how long the cases so far took.

    Args:
        minutes: length of the call, which starts now.
        guesses: seconds of a case of each mode that has not been measured yet.
    """

    def __init__(self, minutes: float, guesses: Mapping[str, float] = GUESSES) -> None:
        self.seconds, self.start = 60 * minutes, time.monotonic()
        self._guesses, self._longest = guesses, dict[str, float]()
        self._group: tuple[str, int, float] | None = None  # mode, number and start of those running
        self._spent = False  # something did not fit: what comes later is less useful

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.start + self.seconds - time.monotonic()

    def take(self, cases: Sequence[Case]) -> int:
        """Return how many of the next cases fit; called again when they have been measured."""
        if self._group is not None:
            mode, count, start = self._group
            each = (time.monotonic() - start) / count
            self._longest[mode] = max(each, self._longest.get(mode, 0.0))
            self._group = None
        if not cases or self._spent:
            return 0
        mode = cases[0].mode
        alike = sum(1 for _ in itertools.takewhile(lambda case: case.mode == mode, cases))
        each = MARGIN * self._longest.get(mode, self._guesses[mode])
        count = min(alike, at_once(), int(max(0.0, self.left) // each))
        self._spent = not count
        if count:
            self._group = mode, count, time.monotonic()
        return count
