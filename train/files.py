"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the file, on the disk, and put it in place in one step."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Put a text in place of what was there."""
    replace(path, lambda part: part.write_text(text))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Put a state of tensors and plain values in place of what was there."""
    replace(path, lambda part: torch.save(state, part))


def read_state(path: Path) -> dict[str, Any]:
    """A state written by :func:`write_state`; a torn file is a ValueError."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and value errors of torch.load
        raise ValueError(f"{path} cannot be read as a run's state: {error}") from error
    return state
