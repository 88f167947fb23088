"""Save and load converted models: their weights, and the kernel of each converted layer."""

from __future__ import annotations

import json
import os
from typing import Any, TypeVar

from torch import nn

from ..factory import write_weights
from ..modes import unwrapped
from ..weights import read_metadata, read_weights
from .replace import convert, converted_layers, revert

M = TypeVar("M", bound=nn.Module)
_KEY = "conversion"


def save_converted(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights and the conversion of a model to a safetensors file, atomically.

    Args:
        model: a converted model; of one inside ``torch.compile`` or a wrapper for data-parallel
            training, the file is the same.
        path: of the file; it must end in .safetensors.

    Raises:
        ValueError: for a model that is not converted, or an invalid path.
        OSError: if it cannot be written.
    """
    model = unwrapped(model)
    layers = converted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no converted layers: call vx.convert first")
    recipes = {name: layer.kernel.recipe for name, layer in layers.items()}
    write_weights(model.state_dict(), path, {_KEY: json.dumps(recipes)})


def load_converted(path: str | os.PathLike[str], model: M) -> M:
    """Convert a model in place as recorded by :func:`save_converted`, and load its weights.

    Args:
        path: of the file.
        model: a model of the same architecture with softmax; its weights are replaced.

    Returns:
        The model.

    Raises:
        ValueError: for a file without a conversion, or a model that the weights do not fit. The
            model is then not converted.
    """
    state, metadata = read_weights(path), read_metadata(path)
    if _KEY not in metadata:
        raise ValueError(f"{path} has no conversion: was it written by save_converted?")
    recipes: dict[str, dict[str, Any]] = json.loads(metadata[_KEY])
    kernels = tuple(f"{name}.kernel." for name in recipes)
    expected = {k: v.shape for k, v in state.items() if not k.startswith(kernels)}
    own = {k: v.shape for k, v in model.state_dict().items()}
    if differing := sorted(expected.items() ^ own.items()):
        raise ValueError(
            f"{path} belongs to another model than this {type(model).__name__}: they differ in "
            f"{len({k for k, _ in differing})} tensor(s), the first is {differing[0][0]}"
        )
    try:
        for recipe in {json.dumps(r): r for r in recipes.values()}.values():
            names = {name for name, r in recipes.items() if r == recipe}
            convert(
                model, recipe["mixer"], layers=lambda n, _, names=names: n in names,
                image_size=recipe["image_size"], center_keys=recipe["center_keys"],
                **recipe["options"],
            )  # fmt: skip
        model.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        if converted_layers(model):
            revert(model)
        raise ValueError(f"{path}: {error}") from error
    return model
