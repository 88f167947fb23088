"""Memory of benchmark cases, computed from shapes without running them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_xformer.memory_use import (
    MIB,
    StorageCounter,
    bytes_kept,
    caches_kept,
    without_data,
)
from vision_xformer.planning import planned_for

from ..html import Table
from .cases import Case, ready, sketch
from .rows import Row, label, number


def estimate(case: Case, device: str = "cpu") -> Row:
    """Compute the columns kept_mib and peak_mib of a row, as they are measured.

    Args:
        case: an eager case.
        device: "cpu" or "cuda", whose operators are used.

    Raises:
        ValueError: if the combination of name, size and mixer is invalid.
    """
    module, x, rest = sketch(case)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with caches_kept():
        twin = without_data(module, fake)
        with fake, planned_for(device):
            given = torch.empty((case.batch, *x.shape[1:]), device="cpu")
            subject = ready(case, twin, given, rest)
            kept = bytes_kept(twin, subject.forward)
            with StorageCounter() as counter:
                subject.step()  # creates the optimizer state
                counter.restart()
                subject.step()
    return {"kept_mib": kept / MIB, "peak_mib": counter.peak / MIB}


def computed(case: Case, device: str) -> Row:
    """Compute the column computed_mib; compiled cases have none."""
    if case.mode != "eager":
        return {}
    return {"computed_mib": estimate(case, device)["peak_mib"]}


def computed_table(rows: Sequence[Row]) -> Table:
    """Tabulate the computed and the measured peak of a training step, and their ratio."""
    lines = []
    for row in rows:
        if row["computed_mib"]:
            peak = row["peak_mib"]
            measured = "OOM" if row["status"] == "out of memory" else number(peak) if peak else ""
            ratio = f"{row['computed_mib'] / peak:.3f}" if peak else ""
            cells = [number(row["computed_mib"]), measured, ratio]
            lines.append([label(row), f"{row['size']:,}", *cells])
    headings = ["", "size", "computed, MiB", "measured, MiB", "computed / measured"]
    return Table(headings, lines, "peak memory of a training step, eager")
