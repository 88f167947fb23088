"""Optimization: learning-rate schedule, parameter groups and the moving average of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters so that only weights of linear layers and convolutions decay."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():  # weights of norms are one-dimensional
        is_map = name.endswith("weight") and parameter.ndim > 1
        (decayed if is_map else rest).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build AdamW, SGD with a Nesterov momentum of 0.9, or Muon (Jordan et al. 2024).

    Muon orthogonalizes the updates of linear layers and convolutions, at the size of AdamW's, and
    leaves all other parameters to AdamW.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    if config.optimizer == "muon":
        groups[1]["use_fallback"] = True
        return Muon(groups, lr=config.lr, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


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
