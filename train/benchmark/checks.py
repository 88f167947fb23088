"""The tests that need a CUDA GPU (``pytest -m cuda``), counted in a CSV file."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from .rows import Row, read_csv, revision, take_up, write_csv

TESTS = Path(__file__).parents[2] / "tests"
COLUMNS = ("file", "status", "passed", "failed", "skipped", "seconds", "revision")
_MARK = re.compile(r"^(@|pytestmark = | +)pytest\.mark\.cuda\b", re.MULTILINE)
_EXPECTED_SECONDS = 60.0  # of a file
METHOD = ("tests of each file that are marked cuda; status: ok, or the names of those that failed",)


def files(folder: Path = TESTS) -> list[Path]:
    """List the files with tests that are marked ``cuda``, as ``@pytest.mark.cuda`` or a module."""
    return [
        file
        for file in sorted(folder.glob("test_*.py"))
        if _MARK.search(file.read_text(encoding="utf-8"))
    ]


def run_file(file: Path, seconds: float) -> Row:
    """Run the marked tests of a file.

    Args:
        file: of tests.
        seconds: after which the tests are stopped.
    """
    row: Row = {"file": file.name, "passed": 0, "failed": 0, "skipped": 0}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider",
                 f"--junitxml={report}", str(file)]  # fmt: skip
        try:
            done = subprocess.run(
                words, cwd=file.parents[1], capture_output=True, encoding="utf-8", timeout=seconds
            )
            row |= _counts(report) if report.is_file() else {"status": _last(done)}
        except subprocess.TimeoutExpired:
            row["status"] = f"did not finish in {seconds:.0f} seconds"
    return row | {"seconds": time.monotonic() - start}


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else f"pytest ended with {done.returncode}"


def _counts(report: Path) -> Row:
    """Read pytest's report."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = sorted({str(case.get("name")) for case in bad})
    return {
        "status": f"failed: {' '.join(failed)}" if failed else "ok",
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
    }


def run_tests(out: Path, left: float, command: str, folder: Path = TESTS) -> tuple[str, int]:
    """Run the tests that have not been run for this file, and write their counts to it.

    A file of tests is not started in the last minute.

    Args:
        out: CSV file to create or to extend.
        left: seconds after which the tests are stopped.
        command: command line, recorded in the file.
        folder: of the tests.

    Returns:
        A sentence, and the number of files that are left for the next call.

    Raises:
        ValueError: if ``out`` holds rows of another device or of other versions.
    """
    marked = files(folder)
    if not marked:
        return f"{folder} has no tests marked cuda: skipped", 0
    end = time.monotonic() + left
    lines, rows = take_up(out, METHOD, command, read_csv)
    missing = [file for file in marked if file.name not in {row["file"] for row in rows}]
    while missing and (here := end - time.monotonic()) >= _EXPECTED_SECONDS:
        rows.append(run_file(missing.pop(0), here) | {"revision": revision()})
        write_csv(out, lines, COLUMNS, rows)
    sums = {name: sum(int(row[name]) for row in rows) for name in ("passed", "failed", "skipped")}
    said = [", ".join(f"{count:,} {name}" for name, count in sums.items())]
    said += [f"{row['file']}: {row['status']}" for row in rows if row["status"] != "ok"]
    said += [f"{len(missing)} files left for the next call"] * bool(missing)
    return "; ".join(said), len(missing)
