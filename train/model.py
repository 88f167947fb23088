"""The models of a run: the one that is trained, and a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vision_xformer as vx

from .config import ModelConfig
from .data import Splits


def build_model(config: ModelConfig, data: Splits) -> vx.VisionModel:
    """Build the model of a configuration for the images and classes of a data set.

    Raises:
        ValueError: for an unknown name or option, or one that the data determines.
    """
    taken = {"image_size", "channels", "input_shape", "num_classes", "mixer", "mixer_options"}
    if clash := taken & config.options.keys():
        raise ValueError(
            f"model.options must not have {', '.join(sorted(clash))}: the data determines the "
            "sizes, and model.mixer and model.mixer_options the mixer"
        )
    return vx.create_model(
        config.name,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=len(data.classes),
        mixer=config.mixer,
        mixer_options=config.mixer_options or None,
        **config.options,
    )


def load_teacher(path: str | None, model: vx.VisionModel, device: torch.device) -> nn.Module | None:
    """Load a teacher for the same images and classes; a LeViT with two heads trains both.

    Raises:
        ValueError: for a teacher of other images or classes.
    """
    if path is None:
        return None
    teacher = vx.load_model(path).to(device)
    for field in ("input_shape", "num_classes"):
        theirs, ours = getattr(teacher.config, field), getattr(model.config, field)
        if theirs != ours:
            raise ValueError(f"train.teacher {path} has {field} {theirs}; the model has {ours}")
    if isinstance(model, vx.LeViT) and model.config.distilled:
        model.set_distilled_training()
    return teacher


@torch.no_grad()
def not_finite(model: nn.Module, x: Tensor, step: int, rate: float) -> ValueError:
    """The error for a loss that is not finite: it names the first layer that is not.

    Args:
        model: the model.
        x: images (B, C, H, W) of that step.
        step: number of the step.
        rate: its learning rate.
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
