"""Models in files: weights and configuration together, as safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .backbones import Backbone
from .weights import load_weights, read_weights
from .zoo import create_model


def save_model(model: Backbone, path: str | os.PathLike[str]) -> None:
    """Write weights and configuration to one safetensors file, whole or not at all."""
    path = Path(path)
    if not isinstance(model, Backbone):
        raise ValueError(f"save_model takes a model of create_model, not a {type(model).__name__}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} must be a file in a folder that exists")
    metadata = {"config": json.dumps(model.config.to_dict())}
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(state, part, metadata)
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load_model(path: str | os.PathLike[str]) -> Backbone:
    """Rebuild a model from :func:`save_model`'s file, in evaluation mode on the CPU."""
    state = read_weights(path)
    metadata = None
    if Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    if not metadata or "config" not in metadata:
        raise ValueError(f"{path} has no model configuration: was it written by save_model?")
    try:
        model = create_model(json.loads(metadata["config"]))
        # in the type it was saved in
        model.to(next(t.dtype for t in state.values() if t.is_floating_point()))
        load_weights(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.eval()
