"""What became worse from one file of rows to another."""

from __future__ import annotations

import math
from pathlib import Path

from .rows import key, label, peer, ratio, read_rows

_NOISE = {"kept_mib": 1.0, "peak_mib": 1.0, "step_ms_p50": 5.0, "infer_ms_p50": 5.0}


def grown(before: float | None, after: float | None, noise: float) -> float:
    """after / before, where neither is missing and they are above the noise; else 1."""
    if before is None or after is None or max(before, after) < noise:
        return 1.0
    return after / before if before else math.inf


def compare(before: Path, after: Path, threshold: float) -> tuple[list[str], str]:
    """A sentence for each figure that grew by more than the threshold, as a share; and one that
    says how much was compared.

    Kept memory as it is; time against the public package's in the same file, so that another
    machine or a slow day does not count. Where both files are of one device and versions, peaks and
    times as they are too. Less than 1 MiB or 5 ms is noise.
    """
    (old_lines, old_rows), (new_lines, new_rows) = read_rows(before), read_rows(after)
    old, new = ({key(row): row for row in rows} for rows in (old_rows, new_rows))
    shared = [k for k in old if k in new]
    if not shared:
        raise ValueError(f"{before} and {after} have no row in common")
    columns = ["kept_mib"]
    if old_lines[:2] == new_lines[:2]:
        columns += ["peak_mib", "step_ms_p50", "infer_ms_p50"]
    worse = []
    for k in shared:
        was, now = old[k], new[k]
        what = f"{was['kind']} {label(was)} at {was['size']:,} ({was['dtype']})"
        if was["status"] == "ok" and now["status"] != "ok":
            worse.append(f"{what}: {now['status']}")
        growth = {column: grown(was[column], now[column], _NOISE[column]) for column in columns}
        first = ratio(was, peer(was, old_rows), "step_ms_p50")
        second = ratio(now, peer(now, new_rows), "step_ms_p50")
        longest = max(row["step_ms_p50"] or 0.0 for row in (was, now))
        if first and second and longest >= _NOISE["step_ms_p50"]:
            growth["step over the package's"] = second / first
        worse += [
            f"{what}: {column} is {times:.2f} times what it was"
            for column, times in growth.items()
            if times > 1 + threshold
        ]
    said = f"{len(shared)} of {len(old)} rows of {before} compared"
    return worse, said if len(shared) == len(old) else f"{said}, {after} has no others"
