"""Optimization: learning-rate schedule, parameter groups and the moving average of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import Muon
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .config import TrainConfig

_Tensors = tuple[Tensor, ...] | list[Tensor]


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Compute the learning rate of a step: linear warm-up, then cosine decay to 0.

    Args:
        step: index of the step.
        steps: number of steps of the whole training.
        warmup: number of warm-up steps.
        highest: learning rate at the end of the warm-up.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Split parameters so that only weights of linear layers and convolutions decay.

    With a ``layer_decay`` below 1, each layer of the model's ``group_matcher`` has its own groups,
    whose learning rate is scaled by ``layer_decay`` to the power of the number of layers above.
    Frozen parameters are left out. The keys ``lr_scale`` and ``use_fallback`` (for Muon) are those
    of timm.

    Args:
        model: the model.
        weight_decay: of the weights of linear layers and convolutions.
        layer_decay: factor of the learning rate from each layer to the one below.

    Raises:
        ValueError: if ``layer_decay`` is below 1 and the model has no ``group_matcher``.
    """
    layers: dict[str, int] = {}
    if layer_decay < 1:
        matcher: Any = getattr(model, "group_matcher", None)
        if matcher is None:
            name = type(model).__name__
            raise ValueError(f"train.layer_decay {layer_decay}: {name} has no group_matcher")
        layers = group_parameters(model, matcher(coarse=False), reverse=True)
    top = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():  # weights of norms are one-dimensional
        if parameter.requires_grad:
            is_map = name.endswith("weight") and parameter.ndim > 1
            groups.setdefault((layers.get(name, top), not is_map), []).append(parameter)
    return [
        {
            "params": groups[layer, is_rest],
            "weight_decay": 0.0 if is_rest else weight_decay,
            "lr_scale": layer_decay ** (top - layer),
            "use_fallback": is_rest,
        }
        for layer, is_rest in sorted(groups)
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build AdamW, SGD with a Nesterov momentum of 0.9, or Muon (Jordan et al. 2024).

    Muon orthogonalizes the updates of linear layers and convolutions; all other parameters are
    trained by AdamW.
    """
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.lr, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the learning rate of all groups, scaled by ``lr_scale``; return the unscaled one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate


def average(model: nn.Module, decay: float) -> AveragedModel:
    """Build an exponential moving average (EMA) of weights and buffers.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow and timm, so that
    the first steps are soon forgotten.
    """

    @torch.no_grad()
    def update(averages: _Tensors, current: _Tensors, steps: Tensor | int) -> None:
        now = min(decay, (1 + int(steps)) / (10 + int(steps)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, 1 - now)
        else:
            torch._foreach_copy_(averages, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
