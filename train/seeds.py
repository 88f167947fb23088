"""Seeds that are a function of numbers, such as the seed of the run and the step."""

from __future__ import annotations

import numpy as np


def seed_of(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
