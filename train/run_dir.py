"""The folder of a run: its name, its owner, and what a run writes there first."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import write_whole
from .checkpoint import resolved
from .config import RunConfig
from .provenance import note_session

if TYPE_CHECKING:
    from .loop import Run

_WRITTEN_FIRST = ("config.yaml", "classes.json", "sessions.json")  # before the first step


def new_folder(config: RunConfig) -> Path:
    """The folder that was asked for, or the first free name.

    Raises:
        ValueError: for a folder that already holds a run.
    """
    if config.run_dir is not None:
        folder = Path(config.run_dir).expanduser()
        if (folder / "config.yaml").exists():
            raise ValueError(
                f"run_dir {folder} already holds a run: resume it with --resume {folder}, "
                "choose another, or remove it"
            )
        return folder
    parts = [config.model.name, config.model.mixer or "", config.data.name, str(config.seed)]
    name = Path("runs") / "-".join(p for p in parts if p).lower().replace(":", "-")
    numbered = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
    return next(f for f in itertools.chain([name], numbered) if not f.exists())


def open_folder(run: Run) -> bool:
    """Make the folder of a run with its first files, and print the notes about its data.

    Returns:
        Whether this is a new run, whose folder may be discarded.

    Raises:
        ValueError: if another run took the folder in the meantime.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if not run.resumed:
        try:
            (run.folder / "config.yaml").touch(exist_ok=False)
        except FileExistsError as error:
            raise ValueError(f"run_dir {run.folder} already holds a run") from error
    write_whole(run.folder / "config.yaml", resolved(run.config))
    write_whole(run.folder / "classes.json", json.dumps(run.data.classes) + "\n")
    note_session(run.folder / "sessions.json", run.accelerator, run.step)
    for note in run.data.notes:
        print(note, file=sys.stderr)
    return not run.resumed


def discard(run: Run) -> None:
    """Remove what a new run wrote, unless there is a state to resume from."""
    if not run.claimed or (run.folder / "state.pt").is_file():
        return
    for name in _WRITTEN_FIRST:
        (run.folder / name).unlink(missing_ok=True)
    shutil.rmtree(run.folder / "events", ignore_errors=True)
    with contextlib.suppress(OSError):  # it contains something else
        run.folder.rmdir()
