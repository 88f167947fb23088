"""Which device trains, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from .config import TrainConfig


def pick_precision(precision: str, cpu: bool) -> str:
    """Accelerate's word for a precision; "auto" is what the device does well."""
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    if not cpu:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    # a function of newer PyTorch only
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "no"


def make_accelerator(config: TrainConfig, folder: Path | None = None) -> Accelerator:
    """Device, precision and processes; with a folder, events for TensorBoard where it is installed.

    Raises:
        ValueError: for a device that is not there, a precision it does not train in, or a launcher
            that cuts the model in pieces.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device cuda: PyTorch finds no such device; choose auto or cpu")
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = pick_precision(config.precision, cpu)
    if precision == "fp16" and cpu:
        raise ValueError("train.precision fp16 needs a GPU; choose auto, bf16 or fp32")
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=precision,
        log_with=None if folder is None else "tensorboard",
        project_dir=folder,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"launched with {accelerator.distributed_type.value}: each process keeps the whole "
            "model here; launch with --multi_gpu or --num_processes alone"
        )
    return accelerator
