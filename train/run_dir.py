"""The folder of a run: its name, its owner, and what a run writes there first."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import write_whole
from .checkpoint import complete, resolved
from .cli import command_text
from .config import RunConfig
from .lock import LOCK
from .log import log
from .measure import forget_peak
from .provenance import device_name, note_session
from .text import shell_path

if TYPE_CHECKING:
    from .loop import Run

# files that are of no use without weights
_WITHOUT_WEIGHTS = (
    "config.yaml", "classes.json", "sessions.json", "log.txt", LOCK, "metrics.csv",
    "last.safetensors",
)  # fmt: skip


def new_folder(config: RunConfig) -> Path:
    """The folder that was asked for, or the first free name.

    Raises:
        ValueError: for a folder that already holds a run, or that cannot be made.
    """
    if config.run_dir is not None:
        folder = Path(config.run_dir).expanduser()
        if (folder / "config.yaml").exists():
            raise ValueError(
                f"run_dir {folder} already holds a run: resume it with "
                f"{command_text(['--resume', shell_path(folder)])}, choose another, or remove it"
            )
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"run_dir {folder} must be a folder, but {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"run_dir {folder}: {there} must be a folder that you may write to")
        return folder
    parts = [config.model.name, config.model.mixer or "", config.data.name, str(config.seed)]
    # Windows does not allow the colon of a name such as torchvision:MNIST
    name = Path("runs") / re.sub(r"[^\w.-]", "-", "-".join(p for p in parts if p).lower())
    numbered = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
    return next(f for f in itertools.chain([name], numbered) if not f.exists())


def open_folder(run: Run) -> None:
    """Write the configuration, the classes and this session to the folder of a run.

    The result of a complete run that is trained further is removed until there is a new one.

    Raises:
        ValueError: if another run has taken the folder meanwhile, or nothing is left to train.
    """
    if run.resumed:
        if run.finished and (run.folder / "result.json").is_file():
            c = run.config.train
            raise complete(run.folder, c.patience if len(run.rows) < c.epochs else 0)
        (run.folder / "result.json").unlink(missing_ok=True)
    elif (run.folder / "config.yaml").exists():
        raise ValueError(f"run_dir {run.folder} already holds a run")
    forget_peak()  # of earlier runs in this process
    run.claimed = not run.resumed  # so that discard() may remove what is written from here on
    write_whole(run.folder / "config.yaml", resolved(run.config))
    write_whole(run.folder / "classes.json", json.dumps(run.data.classes) + "\n")
    note_session(run.folder / "sessions.json", run.accelerator, run.step)
    log(run, f"step {run.step} of {run.steps}, on {device_name(run.device)}")
    for note in run.data.notes:
        log(run, note, show=True)


def discard(run: Run) -> None:
    """Remove what a new run wrote, unless it has weights to use or a state to resume from."""
    kept = any((run.folder / name).is_file() for name in ("state.pt", "best.safetensors"))
    if not run.claimed or kept:
        return
    for tracker in run.accelerator.trackers:  # Windows cannot remove open files
        tracker.finish()
    for name in _WITHOUT_WEIGHTS:
        (run.folder / name).unlink(missing_ok=True)
    shutil.rmtree(run.folder / "events", ignore_errors=True)
    with contextlib.suppress(OSError):  # it contains something else
        run.folder.rmdir()
