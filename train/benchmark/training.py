"""Training runs of the suite: accuracy, images/s and peak memory of the paper's models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..atomic import read_yaml
from ..commands import read_run
from ..config import RunConfig
from ..data import load_data
from ..devices import pick_precision
from ..recipes import parse
from .budget import Budget
from .cases import Case
from .measuring import DEVICE, measure
from .rows import Row, read_csv, revision, take_up, write_csv
from .worker import says_out_of_memory

ROOT = Path(__file__).parents[2]
COLUMNS = (
    "model", "status", "epochs", "precision", "batch", "parameters", "val_top1", "test_top1",
    "test_top5", "images_per_second", "peak_mib", "minutes", "revision",
)  # fmt: skip
METHOD = (
    "each row is a run of python -m train fit, whose folder is in runs next to this file; all runs",
    "have the number of epochs that fitted into the time left when the first one started; the test",
    "set was evaluated once, with the weights that were best on the validation images; images/s:",
    "training with augmentation, without evaluation; peak: maximum of the process, with the images",
)
_START_SECONDS = 25.0  # of a run, around its epochs
_SLOWER = 1.5  # an epoch with augmentation and validation, relative to training steps alone


def epochs_that_fit(left: float, runs: int, config: RunConfig, images: int, most: int) -> int:
    """Choose the number of epochs of all runs, from the speed of the first model.

    Args:
        left: seconds for all runs.
        runs: number of runs.
        config: of the first run.
        images: number of training images.
        most: largest number of epochs.
    """
    dtype = pick_precision(config.train.precision, DEVICE).replace("no", "fp32")
    case = Case("model", config.model.name, config.data.image_size or 32,
                config.data.batch_size, dtype)  # fmt: skip
    speed = measure([case], _NoBar())[0].get("images_per_second")
    if not speed:  # the run itself will say why
        return 1
    each = left / runs - _START_SECONDS
    return int(max(1, min(most, each // (_SLOWER * images / speed))))


class _NoBar:
    def set_postfix_str(self, text: str) -> None:
        pass

    def update(self) -> None:
        pass


def train_until(words: Sequence[str], seconds: float) -> str | None:
    """Run ``python -m train`` in a process of its own, and stop it when the time is up.

    Args:
        words: arguments of the program.
        seconds: after which the run is stopped; its state is then saved.

    Returns:
        "ok", the reason why the run failed, or None if it was stopped.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # Ctrl-C reaches this process alone, which stops the run once
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()
    if process.returncode == 0:
        return "ok"
    if says_out_of_memory(said):
        return "out of memory"
    lines = said.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"ended with {process.returncode}"


def row_of(name: str, status: str, folder: Path) -> Row:
    """Build the row of a run from the files in its folder."""
    row: Row = {"model": name, "status": status, "revision": revision()}
    if status != "ok":
        return row
    run = read_run(folder)
    last: dict[str, Any] = run["rows"][-1]
    return row | run["result"] | {
        "epochs": len(run["rows"]),
        "precision": run["sessions"][-1]["precision"].replace("no", "fp32"),
        "batch": run["config"]["data"]["batch_size"],
        "images_per_second": last["images_per_second"],
    }  # fmt: skip


def train_models(
    out: Path,
    names: Sequence[str],
    recipe: Sequence[str],
    most_epochs: int,
    budget: Budget,
    command: str,
) -> list[Row]:
    """Train the models that have no row yet, as far as the time allows.

    Runs that an earlier call stopped are resumed. The first run starts only if at least half of the
    call is left, because it determines the number of epochs of all.

    Args:
        out: CSV file to create or to extend; the runs are in ``runs`` next to it.
        names: models to train.
        recipe: other arguments of ``python -m train fit``.
        most_epochs: largest number of epochs.
        budget: time left.
        command: command line, recorded in the file.

    Returns:
        The rows of the models, trained now or before.

    Raises:
        ValueError: if the images cannot be read, or ``out`` is of another device or other versions.
    """
    lines, rows = take_up(out, METHOD, command, read_csv)
    missing = [name for name in names if name not in {row["model"] for row in rows}]
    folders = {name: out.parent / "runs" / name.lower() for name in names}
    known = [f / "config.yaml" for f in folders.values() if (f / "config.yaml").is_file()]
    if not missing or (not known and budget.left < budget.seconds / 2):
        return rows
    config = parse([*recipe, "--model.name", missing[0]])
    data = load_data(config.data, torch.device("cpu"))
    config.data.image_size = data.image_size
    if known:
        epochs = read_yaml(known[0])["train"]["epochs"]
    else:
        epochs = epochs_that_fit(budget.left, len(missing), config, len(data.train), most_epochs)
    longest = _START_SECONDS  # of a run
    for name in missing:
        before = budget.left
        if before < longest:
            break
        folder = folders[name]
        if (folder / "result.json").is_file():  # complete, but the row could not be written
            status: str | None = "ok"
        elif (folder / "config.yaml").is_file():
            status = train_until(["resume", str(folder)], before)
        else:
            options = ["--train.epochs", str(epochs), "--run_dir", str(folder)]
            status = train_until(["fit", *recipe, "--model.name", name, *options], before)
        if status is None:
            break
        longest = max(longest, before - budget.left)
        rows.append(row_of(name, status, folder))
        write_csv(out, lines, COLUMNS, rows)
    return rows
