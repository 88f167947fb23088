"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the file, on the disk, and put it in place in one step; else an OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
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


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, a list or a dict; a ValueError names a file that holds none."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, has a {type(value).__name__}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file of options holds; a ValueError names a file that holds none."""
    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold options with values")
    return value
