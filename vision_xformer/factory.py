"""Models by name, by configuration, and in files."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .backbones import BACKBONES, Config, VisionModel
from .backbones.feature_net import FeatureNet
from .backbones.publishing import published
from .backbones.resizing import changed_layer
from .mixers import mixer_options as options_of_mixer
from .names import name_to_config, with_mixer
from .options import check_options, check_types, options_of
from .stems import STEMS
from .weights import load_weights, read_metadata, read_weights
from .weights.files import check_target, replacing

# fields with options, and of what
_OPTIONS = {
    "mixer_options": "mixer",
    "class_options": "class_mixer",
    "cross_options": "cross_mixer",
    "stem_options": "stem",
}
_PIXELS = ("mean", "std")  # entries of pretrained_cfg that are saved


@overload
def create_model(
    name: str | Config | Mapping[str, Any], *, features_only: Literal[False] = False, **options: Any
) -> VisionModel: ...
@overload
def create_model(
    name: str | Config | Mapping[str, Any], *, features_only: Literal[True], **options: Any
) -> FeatureNet: ...
def create_model(
    name: str | Config | Mapping[str, Any],
    *,
    image_size: int | tuple[int, ...] | None = None,
    channels: int | None = None,
    mixer: str | None = None,
    mixer_options: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **overrides: Any,
) -> VisionModel | FeatureNet:
    """Build a model (B, C, *shape) -> (B, num_classes) by name, or from the ``config`` of another.

    Args:
        name: one of :func:`list_models` (case, ``-`` and ``_`` are ignored), a configuration, or
            its ``to_dict()``.
        image_size: pixels on all axes, or on each; sets ``input_shape``.
        channels: number of input channels C; sets ``input_shape``.
        mixer: another token mixer, see :func:`~vision_xformer.list_mixers`. Options and heads of
            the name that it does not have are left out.
        mixer_options: added to those of the name; an option that the mixer does not have raises an
            error. ``stem_options``, ``class_options`` and ``cross_options`` likewise.
        weights: a state dict or the path of one, with any keys that
            :func:`~vision_xformer.load_weights` understands. Tensors that fit are loaded, adapted
            to the image size and number of channels if necessary; a warning lists the others. To
            require all of them, call ``load_weights``.
        features_only: return a :class:`~vision_xformer.FeatureNet`, which computes feature maps
            instead of logits.
        out_indices: the layers of these maps, as for ``indices`` of ``forward_intermediates``.
        overrides: any other field of the configuration, such as ``num_classes``, or
            ``input_shape=(1, 4096)`` for signals and ``(1, 28, 28, 28)`` for volumes.

    Returns:
        The model in training mode, a :class:`~vision_xformer.VisionModel` or FeatureNet, with new
        weights except for those given.

    Raises:
        ValueError: for an unknown name, field or option (with the nearest), or values that do not
            fit together.
    """
    given = {"mixer": mixer, "mixer_options": mixer_options}
    check_types({**given, "features_only": features_only}, create_model)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices {out_indices} needs features_only=True")
    config = _config_of(name, mixer)
    what = f"model {name!r}" if isinstance(name, str) else f"backbone {config.backbone!r}"
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changes = overrides | {k: v for k, v in given.items() if v is not None}
    used = str(mixer or fields["mixer"]) if "mixer" in fields else ""
    own = options_of_mixer(used).keys() if used else set()
    for option in sorted((overrides.keys() & own) - fields.keys()):
        raise ValueError(
            f"{option} is an option of mixer {used!r}: give it as "
            f"mixer_options={{{option!r}: {overrides[option]!r}}}"
        )
    check_options(what, changes, {*fields, "image_size", "channels"})
    if image_size is not None or channels is not None:
        if "input_shape" in changes:
            raise ValueError("give either input_shape or image_size and channels, not both")
        changes["input_shape"] = input_shape_of(config.input_shape, image_size, channels)
    if mixer is not None and mixer != fields["mixer"]:
        fields |= with_mixer(fields, mixer, fields["mixer_options"])
    for option, part in _OPTIONS.items():
        if option in fields and isinstance(changes.get(option, {}), Mapping):
            _merge_options(fields, changes, option, part)
    model = BACKBONES[config.backbone](type(config)(**{**fields, **changes}))
    if weights is not None:
        report = load_weights(model, weights, resize=True, strict=False)
        if report.unused or report.missing:
            warnings.warn(f"weights of {what}: {report}", stacklevel=2)
    return FeatureNet(model, out_indices) if features_only else model


def _merge_options(
    fields: Mapping[str, Any], changes: dict[str, Any], option: str, part: str
) -> None:
    """Add options to those of the same part; of another one, keep the options that it has, too."""
    name = changes.get(part, fields[part])
    if name == fields[part]:
        changes[option] = {**fields[option], **changes.get(option, {})}
    elif option not in changes and isinstance(name, str):
        known = options_of(STEMS[name]) if part == "stem" else options_of_mixer(name)
        changes[option] = {key: value for key, value in fields[option].items() if key in known}


def _config_of(name: str | Config | Mapping[str, Any], mixer: str | None) -> Config:
    if isinstance(name, str):
        return name_to_config(name, mixer)
    if isinstance(name, Config):
        return name
    if not isinstance(name, Mapping) or not isinstance(name.get("backbone"), str):
        raise ValueError(
            f"a model is a name, a Config or its dict with the key 'backbone', not {name!r}"
        )
    return BACKBONES[name["backbone"]].config_class.from_dict(name)


def input_shape_of(
    default: tuple[int, ...], image_size: int | tuple[int, ...] | None, channels: int | None
) -> tuple[int, ...]:
    """The shape (C, *shape) for an image size and channels; None keeps those of ``default``.

    Raises:
        ValueError: for a value of the wrong type.
    """
    check_types({"image_size": image_size, "channels": channels}, create_model)
    size = default[1:]
    if isinstance(image_size, int):
        size = (image_size,) * len(size)
    elif image_size is not None:
        size = tuple(image_size)
    return (default[0] if channels is None else channels, *size)


def save_model(model: VisionModel, path: str | os.PathLike[str]) -> None:
    """Write weights, configuration and pixel statistics to one safetensors file, atomically.

    Raises:
        ValueError: for a module that is not a VisionModel, or an invalid path.
        OSError: if it cannot be written.
    """
    if not isinstance(model, VisionModel):
        raise ValueError(f"save_model takes a model of create_model, not a {type(model).__name__}")
    if any(hasattr(module, "recipe") for module in model.modules()):
        raise ValueError("save_model cannot save a converted model: use vx.save_converted")
    with torch.device("meta"):
        changed = changed_layer(model, BACKBONES[model.config.backbone](model.config))
    if changed:
        raise ValueError(
            f"save_model cannot save a model whose layers changed after it was built, {changed}: "
            "save its state_dict()"
        )
    known = published(model.pretrained_cfg, model.config.input_shape[0])
    pixels = {key: json.dumps(known[key]) for key in _PIXELS if key in known}
    metadata = {"config": json.dumps(model.config.to_dict()), **pixels}
    write_weights(model.state_dict(), path, metadata)


def write_weights(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata to a safetensors file, atomically.

    Tensors that share memory, such as tied weights, are written each.

    Raises:
        ValueError: for an invalid path, or tensors on the meta device.
        OSError: if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    check_target(path)
    for key, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device: it has no values that can be saved")
    try:
        with replacing(path) as part:
            save_file(_separate(state), part, {"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, copied where they share memory with one before."""
    seen: set[int] = set()
    found = {}
    for key, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        found[key] = (tensor.clone() if place in seen else tensor).contiguous()
        seen.add(place)
    return found


def load_model(path: str | os.PathLike[str]) -> VisionModel:
    """Rebuild a model from a file of :func:`save_model`, in evaluation mode on the CPU.

    Raises:
        ValueError: for a file without a configuration, or one that does not fit its weights.
    """
    state, metadata = read_weights(path), read_metadata(path)
    if "config" not in metadata:
        raise ValueError(f"{path} has no model configuration: was it written by save_model?")
    try:
        known = {key: json.loads(metadata[key]) for key in _PIXELS if key in metadata}
        model = rebuilt(json.loads(metadata["config"]), state, known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def rebuilt(
    config: Mapping[str, Any], state: Mapping[str, Tensor], known: Mapping[str, Any]
) -> VisionModel:
    """Build a model from its configuration and all its weights, in their dtype, for evaluation.

    Args:
        config: the configuration.
        state: the weights.
        known: entries of ``pretrained_cfg``.

    Raises:
        ValueError: for an invalid configuration, or weights or entries that do not fit it.
    """
    model = create_model(config)
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    if not dtypes:
        raise ValueError("the weights must be floating point tensors, but there are none")
    model.to(dtypes[0])
    load_weights(model, state)
    found = published(known, model.config.input_shape[0])
    model.pretrained_cfg = {key: tuple(value) for key, value in found.items()}
    return model.eval()
