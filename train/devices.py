"""Which device trains, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from vision_xformer.precision import has_bf16

from .config import RunConfig, TrainConfig


def pick_device(device: str) -> str:
    """Resolve ``train.device`` to "cuda", "mps" or "cpu".

    Raises:
        ValueError: for a device that is missing.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name in there if there[name])
    if not there[device]:
        raise ValueError(f"train.device {device}: PyTorch finds no such device; use auto or cpu")
    return device


def pick_precision(precision: str, device: str) -> str:
    """Return the name of a precision in accelerate; "auto" is the fastest with native support.

    On an Apple GPU that is fp32: lower precisions save memory there, but no time.
    """
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    if device == "mps":
        return "no"
    if has_bf16(device):
        return "bf16"
    return "fp16" if device == "cuda" else "no"


def make_accelerator(config: TrainConfig, folder: Path | None = None) -> Accelerator:
    """Set up device, precision and processes.

    Args:
        config: of the run.
        folder: of a run that is trained, for events for TensorBoard if installed.

    Raises:
        ValueError: for a device that is missing, a precision or CUDA graphs that it does not
            support, or a launcher that shards the model.
    """
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    if precision == "fp16" and device == "cpu":
        raise ValueError("train.precision fp16 needs a GPU; use auto, bf16 or fp32")
    if precision == "bf16" and device == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ValueError("train.precision bf16 needs macOS 14; use auto, fp16 or fp32")
    if folder is not None and config.compile == "cudagraphs" and device != "cuda":
        raise ValueError(
            f"train.compile cudagraphs needs a CUDA GPU, not {device}: add --train.compile false"
        )
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision,
        log_with=None if folder is None else "tensorboard",
        project_dir=folder,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"launched with {accelerator.distributed_type.value}: each process keeps the whole "
            "model; launch with --multi_gpu or --num_processes alone"
        )
    return accelerator


def part_size(config: RunConfig, batch_size: int, accelerator: Accelerator) -> int:
    """Images in each part of a batch: one part per process and gradient accumulation step.

    Raises:
        ValueError: for a batch that these do not divide, or parts too small to mix.
    """
    accumulate, processes = config.train.accumulate, accelerator.num_processes
    parts = accumulate * processes
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size {batch_size} must be a multiple of {parts}: train.accumulate "
            f"{accumulate} times {processes} process(es)"
        )
    if batch_size == parts and (config.augment.mixup or config.augment.cutmix):
        raise ValueError("augment.mixup and augment.cutmix mix images of a part: it has only 1")
    return batch_size // parts


def compiled(net: nn.Module, how: bool | str) -> nn.Module:
    """Compile a module as ``train.compile`` says."""
    if not how:
        return net
    return cast(nn.Module, torch.compile(net, backend="inductor" if how is True else how))
