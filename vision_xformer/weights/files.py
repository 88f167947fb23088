"""Read state dicts from files, extract them from checkpoints, and replace files atomically."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

# keys under which checkpoints hold a state dict; averaged weights first, as in timm
_STATES = ("state_dict_ema", "model_ema", "state_dict", "model")


def state_of(checkpoint: Any) -> Any:
    """Return the state dict in a checkpoint, or the checkpoint itself if it has none."""
    while isinstance(checkpoint, Mapping):
        found = (checkpoint[key] for key in _STATES if isinstance(checkpoint.get(key), Mapping))
        state = next(found, None)
        if state is None:
            break
        checkpoint = state
    return checkpoint


def checked_state(weights: object) -> Mapping[str, Tensor]:
    """Return the state dict in a checkpoint, or the state dict itself, after checking it.

    Raises:
        ValueError: unless it maps names to dense real tensors.
    """
    weights = state_of(weights)
    if not isinstance(weights, Mapping):
        kind = type(weights).__name__
        raise ValueError(f"weights must be a state dict or the path of a file, not {kind}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"weights must be tensors by name; {key!r} is of type {kind}")
        if value.is_meta or value.layout != torch.strided or value.is_complex():
            raise ValueError(f"weights must be dense, real and in memory; {key!r} is not")
    return weights


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file; empty for any other file.

    Raises:
        ValueError: for a safetensors file that cannot be read.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or PyTorch file, which may be a checkpoint with one.

    Raises:
        ValueError: for a file that is missing or truncated, has no state dict, or contains objects
            other than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # checkpoints of timm's training script include its arguments
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = state_of(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        kind = type(error).__name__
        raise ValueError(f"{path} cannot be read as weights: {kind} {error}") from error
    except Exception as error:  # pickle.UnpicklingError and what torch raises for it
        raise ValueError(f"{path} is not a file of tensors only: {type(error).__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        keys = f"; its keys are {sorted(map(str, state))[:5]}" if isinstance(state, dict) else ""
        raise ValueError(f"{path} is not a state dict, name -> tensor{keys}")
    return state


def check_target(path: Path) -> None:
    """Raise a ValueError if there cannot be a file at ``path``."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} must be a file in a folder that exists")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to ``path``, and move it there atomically if writing succeeds."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.touch()
        usual = part.stat().st_mode  # safetensors makes files that only their owner may read
        yield part
        part.chmod(usual)
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
