"""Shared by all tests: tiny sizes of each backbone, one thread (tests run in parallel), a seed."""

from __future__ import annotations

import os

import presets  # noqa: F401 - registers the sizes
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
