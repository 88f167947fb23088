"""Detection of regressions between two files of rows."""

from __future__ import annotations

import math
from pathlib import Path

from .rows import key, label, peer, ratio, read_rows

_NOISE = {"kept_mib": 1.0, "peak_mib": 1.0, "step_ms_p50": 5.0, "infer_ms_p50": 5.0}


def grown(before: float | None, after: float | None, noise: float) -> float:
    """Return after / before, or 1 if either is missing or both are below the noise."""
    if before is None or after is None or max(before, after) < noise:
        return 1.0
    return after / before if before else math.inf


def compare(before: Path, after: Path, threshold: float) -> tuple[list[str], str]:
    """Compare the rows that two files share.

    Memory saved for backward is compared directly. Step times are compared as ratios to the public
    package in the same file, which are independent of the machine. If both files have the same
    device and versions, peak memory and times are compared directly as well. Values below 1 MiB or
    5 ms are treated as noise.

    Args:
        before: CSV file of the baseline.
        after: CSV file to compare with it.
        threshold: largest relative increase that is accepted; 0.15 accepts 15%.

    Returns:
        A sentence for each regression, and one that says how many rows were compared.

    Raises:
        ValueError: if a file cannot be read or the two have no row in common.
    """
    (old_lines, old_rows), (new_lines, new_rows) = read_rows(before), read_rows(after)
    old, new = ({key(row): row for row in rows} for rows in (old_rows, new_rows))
    shared = [k for k in old if k in new]
    if not shared:
        raise ValueError(f"{before} and {after} have no row in common")
    columns, same = ["kept_mib"], old_lines[:2] == new_lines[:2]
    if same:
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
            f"{what}: {column} is {times:.2f} times its former value"
            for column, times in growth.items()
            if times > 1 + threshold
        ]
    said = f"{len(shared)} of {len(old)} rows of {before} were compared"
    notes = [f"{after} lacks the others"] * (len(shared) < len(old))
    if not same:
        notes.append(
            "devices or versions differ, so only the memory saved for backward and the step times "
            "relative to the packages' were compared"
        )
    return worse, "; ".join([said, *notes])
