"""The models of a run: the one that is trained, and a teacher."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.converters.replace import converted_layers
from vision_xformer.factory import write_weights
from vision_xformer.modes import evaluating
from vision_xformer.options import unknown_name_error
from vision_xformer.weights import read_metadata, read_weights

from .config import ConvertConfig, ModelConfig
from .data import Splits
from .pixels import NAMED, pixels_of, pixels_of_weights, set_pixels
from .text import reason

# arguments of timm.create_model that a run sets itself, and what is used instead
_TIMM_TAKEN = {
    "num_classes": "the classes of the data",
    "in_chans": "the channels of the data",
    "img_size": "data.image_size",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict",
         "checkpoint_path", "cache_dir"), "model.weights",
    ),
    **dict.fromkeys(
        ("features_only", "out_indices", "feature_cls", "scriptable", "exportable", "no_jit"),
        "a classifier as it is",
    ),
}  # fmt: skip


class Sizes(NamedTuple):
    """Sizes of a model that the data determines.

    Attributes:
        image_size: height and width in pixels.
        channels: number of channels of the images.
        classes: number of classes.
    """

    image_size: int
    channels: int
    classes: int

    @classmethod
    def of(cls, data: Splits) -> Sizes:
        """Return the sizes of a data set."""
        return cls(data.image_size, data.channels, len(data.classes))


def build_model(config: ModelConfig, sizes: Sizes) -> nn.Module:
    """Build the model of a configuration: (B, channels, H, W) -> (B, classes).

    Raises:
        ValueError: for an unknown name or option, or one that the data determines.
    """
    return converted(build_base(config, sizes), config.convert, sizes)


def converted(model: nn.Module, config: ConvertConfig, sizes: Sizes) -> nn.Module:
    """Convert the attention of a model in place, if the configuration names a kernel.

    Raises:
        ValueError: for a model that cannot be converted, or a kernel that does not fit it.
    """
    if config.mixer is not None:
        vx.convert(
            model, config.mixer, layers=config.layers, image_size=sizes.image_size,
            center_keys=config.center_keys, **config.options,
        )  # fmt: skip
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether a model has converted attention layers."""
    return bool(converted_layers(model))


def conversion_of(path: Path) -> ConvertConfig:
    """Return the conversion of the model in a file of weights; without a kernel if it has none.

    Raises:
        ValueError: for a recipe that cannot be read.
    """
    recipe = _read_recipe(path)
    return ConvertConfig() if recipe is None else recipe[0].convert


def build_base(config: ModelConfig, sizes: Sizes, **timms: Any) -> nn.Module:
    """Build the model of a configuration before conversion: (B, channels, H, W) -> (B, classes).

    Args:
        config: name and options.
        sizes: what the data determines.
        timms: additional arguments of ``timm.create_model``, for a timm model.

    Raises:
        ValueError: for an unknown name or option, or one that the data determines.
    """
    if config.name.startswith("timm:"):
        return _build_timm(config, sizes, timms)
    taken = {"image_size", "channels", "input_shape", "num_classes", "mixer", "mixer_options"}
    if clash := taken & config.options.keys():
        raise ValueError(
            f"model.options must not have {', '.join(sorted(clash))}: the data determines the "
            "sizes, and model.mixer and model.mixer_options the mixer"
        )
    return vx.create_model(
        config.name,
        image_size=sizes.image_size,
        channels=sizes.channels,
        num_classes=sizes.classes,
        mixer=config.mixer,
        mixer_options=config.mixer_options or None,
        **config.options,
    )


def timm_name(name: str) -> str:
    """Return NAME of ``timm:NAME``.

    Raises:
        ValueError: for a model that timm does not have.
    """
    import timm

    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        raise unknown_name_error("timm model", name, timm.list_models())
    return name


def _build_timm(config: ModelConfig, sizes: Sizes, more: dict[str, Any]) -> nn.Module:
    """Build a timm model; its options are the keyword arguments of its class."""
    import timm

    name = timm_name(config.name)
    if config.mixer or config.mixer_options:
        raise ValueError(
            f"model.mixer {config.mixer} and model.mixer_options are not supported for "
            f"{config.name}: use model.convert"
        )
    if clash := sorted(_TIMM_TAKEN.keys() & config.options.keys()):
        raise ValueError(
            f"model.options must not have {clash[0]} {config.options[clash[0]]}: a run uses "
            f"{_TIMM_TAKEN[clash[0]]}"
        )
    arguments = {"in_chans": sizes.channels, "num_classes": sizes.classes, **config.options, **more}
    wrong: list[type[Exception]] = [TypeError, ValueError, AssertionError, LookupError]
    # of a model with weights, the latter says that they do not fit
    wrong += [ArithmeticError] if more else [ArithmeticError, RuntimeError]
    try:
        try:
            model = timm.create_model(name, img_size=sizes.image_size, **arguments)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            model = timm.create_model(name, **arguments)  # a model of any image size
    except tuple(wrong) as error:
        unknown = "unknown name " if isinstance(error, KeyError) else ""
        raise ValueError(
            f"{config.name} cannot be built with model.options {config.options}: "
            f"{unknown}{reason(error)}"
        ) from error
    return _check_size(model, sizes.image_size, sizes.channels)


def _check_size(model: nn.Module, image_size: int, channels: int) -> nn.Module:
    """Return a timm model after a trial: timm itself does not refuse images that do not fit.

    Raises:
        ValueError: for an image size that the model does not support.
    """
    x = torch.zeros(1, channels, image_size, image_size)
    try:
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=()):
            model(x.to(next(model.parameters()).device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"data.image_size {image_size} does not suit this {type(model).__name__}: "
            f"{reason(error)}"
        ) from error
    return model


def save_weights(model: nn.Module, path: Path, config: ModelConfig, sizes: Sizes) -> None:
    """Write the weights, and what is needed to rebuild the model, to a safetensors file."""
    if isinstance(model, vx.VisionModel) and config.convert.mixer is None:
        vx.save_model(model, path)
        return
    recipe = {"model": dataclasses.asdict(config), "sizes": sizes}
    pixels = {k: json.dumps(v) for k, v in pixels_of(model)._asdict().items()}
    write_weights(model.state_dict(), path, {"recipe": json.dumps(recipe), **pixels})


def load_model(path: Path) -> tuple[nn.Module, Sizes]:
    """Rebuild a model from a file of :func:`save_weights`, in evaluation mode on the CPU.

    Returns:
        The model and its sizes.

    Raises:
        ValueError: for a file that was not written by it.
    """
    recipe = _read_recipe(path)
    if recipe is None:
        model = vx.load_model(path)
        channels, *shape = model.config.input_shape
        return model, Sizes(shape[0], channels, model.config.num_classes)
    config, sizes = recipe
    other = build_model(config, sizes)
    try:
        other.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own recipe: {reason(error)}") from error
    set_pixels(other, pixels_of_weights(path, "") or NAMED["half"])
    return other.eval(), sizes


def _read_recipe(path: Path) -> tuple[ModelConfig, Sizes] | None:
    """Return the recipe in a file of weights, or None if it has none.

    Raises:
        ValueError: for a recipe of another version.
    """
    text = read_metadata(path).get("recipe")
    if text is None:
        return None
    try:
        recipe = json.loads(text)
        return ModelConfig.from_dict(recipe["model"]), Sizes(*recipe["sizes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} has a recipe of another version of this program: {reason(error)}"
        ) from error


def resized(model: nn.Module, path: Path, image_size: int, channels: int) -> nn.Module:
    """Return a model for another image size, with the weights of a file of :func:`save_weights`.

    Position tables are resized; pixel statistics and conversion remain.

    Raises:
        ValueError: for a size that the model does not support.
    """
    if isinstance(model, vx.VisionModel):
        other = vx.create_model(model.config, image_size=image_size)
        converted(other, conversion_of(path), Sizes(image_size, channels, other.num_classes))
        vx.load_weights(other, path, resize=True)
        set_pixels(other, pixels_of(model))
        return other.eval()
    if hasattr(model, "set_input_size"):  # of timm
        try:
            model.set_input_size(img_size=(image_size,) * 2)  # type: ignore[operator]
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"data.image_size {image_size}: {reason(error)}") from error
    return _check_size(model, image_size, channels)


def check_part(model: nn.Module, sizes: Sizes, count: int) -> nn.Module:
    """Return the model, after checking that it can be trained on ``count`` images at a time.

    Raises:
        ValueError: for a single image and a batch norm with one value per channel.
    """
    if count > 1:
        return model
    trial, shape = copy.deepcopy(model).train(), (sizes.channels, *[sizes.image_size] * 2)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            trial(torch.zeros(count, *shape))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"data.batch_size must be larger: it leaves {count} image for each process and "
            "accumulation step, and a batch norm of the model needs at least 2"
        ) from error
    return model


def load_teacher(
    path: str | None, model: nn.Module, sizes: Sizes, device: torch.device
) -> nn.Module | None:
    """Load a teacher for the same images and classes; a LeViT with two heads trains both.

    Raises:
        ValueError: for a teacher of other images or classes.
    """
    if path is None:
        return None
    teacher, theirs = load_model(Path(path).expanduser())
    for field, its, ours in zip(Sizes._fields, theirs, sizes, strict=True):
        if its != ours:
            raise ValueError(f"train.teacher {path} has {field} {its}; the data has {ours}")
    expected, given = (pixels_of(m).for_channels(sizes.channels) for m in (teacher, model))
    if expected != given:
        raise ValueError(
            f"train.teacher {path} expects pixels of {expected}; those of the run have {given}: "
            "set data.normalize to that of the teacher"
        )
    teacher = teacher.to(device)
    if isinstance(model, vx.LeViT) and model.config.distilled:
        model.set_distilled_training()
    return teacher


@torch.no_grad()
def not_finite(model: nn.Module, x: Tensor, step: int, rate: float) -> ValueError:
    """Return the error for a loss that is not finite; it names the first such layer.

    Args:
        model: the model.
        x: images (B, C, H, W) of that step.
        step: number of the step.
        rate: learning rate of the step.
    """
    culprits: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                culprits.append(name or "the model")

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules()]
    model(x)
    for hook in hooks:
        hook.remove()
    where = f"first at {culprits[0]}" if culprits else "in the loss or the gradient alone"
    return ValueError(
        f"the loss is not finite in step {step} at learning rate {rate:.2g}, {where}: "
        "lower train.lr, or set train.precision to fp32"
    )
