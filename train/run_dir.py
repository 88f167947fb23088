"""A run's folder: its name, who has it, and the state that belongs to it."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import yaml

from .atomic import read_state, write_whole
from .config import RunConfig

_FIRST = ("config.yaml", "classes.json", "sessions.json")  # what a run writes before its first step


def new_folder(config: RunConfig) -> Path:
    """The folder asked for, which must not hold a run, or the first free name."""
    if config.run_dir is not None:
        folder = Path(config.run_dir).expanduser()
        if (folder / "config.yaml").exists():
            raise ValueError(
                f"run_dir {folder} already holds a run: go on with --resume {folder}, choose "
                "another, or remove it"
            )
        return folder
    parts = [config.model.name, config.model.mixer or "", config.data.name, str(config.seed)]
    name = Path("runs") / "-".join(p for p in parts if p).lower()
    numbered = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
    return next(f for f in itertools.chain([name], numbered) if not f.exists())


def claim(folder: Path) -> None:
    """Take a new run's folder; a ValueError where another took it since we looked."""
    try:
        (folder / "config.yaml").touch(exist_ok=False)
    except FileExistsError as error:
        raise ValueError(f"run_dir {folder} already holds a run") from error


def discard(folder: Path) -> None:
    """Remove what a new run wrote, unless there is a state to go on from."""
    if (folder / "state.pt").is_file():
        return
    for name in _FIRST:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "events", ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()


def write_metrics(folder: Path, rows: list[dict[str, float]]) -> None:
    """A line for each epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "metrics.csv", text.getvalue())


def state_of(folder: Path, config: RunConfig, resolved: str, data: list[str]) -> dict[str, Any]:
    """The saved state, which must be of this configuration and of these images and classes."""
    path = folder / "state.pt"
    state = read_state(path)
    try:
        before, images = _numbers_of(state["config"]), state["data"]
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a state of this run: {error}") from error
    if before != _numbers_of(resolved):
        raise ValueError(
            f"{path} is of a run with another configuration than its config.yaml now: undo "
            "what was changed there, or start a new run"
        )
    if images != data:
        raise ValueError(
            f"{path} is of a run with other images or classes than {config.data.name} in "
            f"{config.data.root} has now: bring them back, or start a new run"
        )
    return state


def _numbers_of(config: str) -> dict[str, Any]:
    """A configuration without what changes no number of a run: it may move to another place."""
    found: dict[str, Any] = yaml.safe_load(config)
    del found["run_dir"], found["train"]["device"], found["train"]["save_every"]
    for name in ("root", "mirror", "in_memory", "workers"):
        del found["data"][name]
    return found
