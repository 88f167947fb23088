"""Measurement of cases in interleaved processes, with rows that are written as they come."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .cases import Case
from .rows import COLUMNS, DEVICE, METHOD, Row, key, revision, take_up, write_csv
from .worker import Worker

TURNS = 6
AT_ONCE = 16  # interleaved processes
_CONTEXT_BYTES = 2**31  # of GPU memory, for a CUDA context and a small case

Take = Callable[[Sequence[Case]], int]  # how many of these cases, sorted, to measure next


def measure(cases: Sequence[Case], bar: Any) -> list[Row]:
    """Measure cases whose processes are interleaved.

    Processes hold memory while they wait, so cases that fail are measured again alone.

    Args:
        cases: at most :func:`at_once` cases of one size.
        bar: progress bar, advanced ``1 + TURNS`` times per measurement.

    Returns:
        One row per case, in order.
    """
    rows = _interleaved(cases, bar)
    lost = [i for i, row in enumerate(rows) if row["status"] != "ok"]  # libraries name it variously
    if len(cases) > 1:
        bar.total += len(lost) * (1 + TURNS)
        for i in lost:
            [rows[i]] = _interleaved([cases[i]], bar)
    return rows


def _interleaved(cases: Sequence[Case], bar: Any) -> list[Row]:
    workers: list[Worker] = []
    try:
        for case in cases:  # they import PyTorch while the first are measured
            bar.set_postfix_str(f"{case.name}, {case.size:,}, start")
            workers.append(Worker(case, DEVICE))
        for worker in workers:
            bar.set_postfix_str(f"{worker.case.name}, {worker.case.size:,}, memory")
            worker.prepare()
            bar.update()
        for _ in range(TURNS):
            for worker in workers:
                bar.set_postfix_str(f"{worker.case.name}, {worker.case.size:,}, time")
                if worker.wants_turns:
                    worker.turn()
                bar.update()
        return [worker.close() for worker in workers]
    finally:
        for worker in workers:
            worker.stop()


def measure_memory(bar: Any, case: Case) -> Row:
    """Measure the memory of one case, without timing it."""
    bar.set_postfix_str(f"{case.mixer}, batch {case.batch}")
    worker = Worker(case, DEVICE)
    try:
        worker.prepare()
        return worker.close()
    finally:
        worker.stop()
        bar.update()


def at_once() -> int:
    """The number of processes that may be interleaved: fewer on a GPU with little memory."""
    if DEVICE == "cpu":
        return AT_ONCE
    total = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(AT_ONCE, total // _CONTEXT_BYTES))


def all_of(cases: Sequence[Case]) -> int:
    """Take as many cases as may be interleaved."""
    return at_once()


def run(
    cases: Sequence[Case],
    out: Path,
    command: str,
    retry: bool = True,
    take: Take = all_of,
) -> list[Row]:
    """Measure all cases, grouped by size, and write them to a CSV file after every group.

    Cases that the file already has measurements of are skipped.

    Args:
        cases: cases; those of one size that are interleaved are next to each other.
        out: CSV file to create or to extend.
        command: command line, recorded in the comments of the file.
        retry: whether cases whose row says why they failed are measured again.
        take: given the next cases of one size, returns how many of them are interleaved next; 0
            stops.

    Returns:
        The rows of ``cases``, measured now or before.

    Raises:
        ValueError: if ``out`` holds rows of another device or of other versions.
    """
    lines, rows = take_up(out, METHOD, command)
    wanted = {dataclasses.astuple(case) for case in cases}
    code = {"revision": revision()}
    known = {key(row) for row in rows if row["status"] == "ok" or not retry}
    left = [case for case in cases if dataclasses.astuple(case) not in known]
    if len(left) < len(cases):
        print(f"{out} already has {len(cases) - len(left)} of {len(cases)} rows; to measure them "
              "again, delete it or choose another --out", file=sys.stderr)  # fmt: skip
    with tqdm(total=len(left) * (1 + TURNS), unit="turn", disable=None) as bar:
        for _, same in itertools.groupby(left, lambda case: case.size):
            group = list(same)
            while group:
                if not (count := take(group)):
                    return [row for row in rows if key(row) in wanted]
                some, group = group[:count], group[count:]
                new = {key(row): row | code for row in measure(some, bar)}
                lines, rows = take_up(out, METHOD, command)  # another process may have added rows
                rows = [*(row for row in rows if key(row) not in new), *new.values()]
                rows.sort(key=lambda row: (row["size"], row["mode"] != "eager", row["name"]))
                out.parent.mkdir(parents=True, exist_ok=True)
                write_csv(out, lines, COLUMNS, rows)
    return [row for row in rows if key(row) in wanted]
