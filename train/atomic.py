"""Files that are written atomically, and read with one sentence for a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from vision_xformer.weights.files import replacing

from .text import reason


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write next to the file, flush to disk, and rename; a failure is an OSError."""
    try:
        with replacing(path) as part:
            write(part)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} cannot be written: {reason(cause)}") from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a text, atomically."""
    replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace a file by a state of tensors and plain values, atomically."""

    def write(part: Path) -> None:
        with part.open("wb") as file:  # whose errors say more than those of torch.save
            torch.save(state, file)

    replace(path, write)


def read_state(path: Path) -> dict[str, Any]:
    """Read a state of :func:`write_state`.

    Raises:
        ValueError: for a file that cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and value errors of torch.load
        raise ValueError(f"{path} cannot be read as a run's state: {reason(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a run's state, has a {type(state).__name__}")
    return state


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file that holds a list or a dict.

    Raises:
        ValueError: for anything else; it names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, has a {type(value).__name__}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ValueError: for anything else; it names the file.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold options with values")
    return value
