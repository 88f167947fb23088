"""Shared by all tests: one thread (they run in parallel), a fixed seed, the published package."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
