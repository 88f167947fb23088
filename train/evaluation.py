"""Predictions for a whole set of images, and their accuracy."""

from __future__ import annotations

import contextlib
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from .augment import plain
from .data import Images
from .pixels import pixels_of


class Accuracy(NamedTuple):
    """Accuracy over a set of images.

    Attributes:
        top1: share of images whose highest logit is that of their class.
        top5: share of images whose class is among the five highest logits, or among all if there
            are fewer than five classes.
        loss: mean cross-entropy.
    """

    top1: float
    top5: float
    loss: float


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Images,
    accelerator: Accelerator,
    batch_size: int,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the logits of all images, each exactly once, across all processes.

    Args:
        model: model to evaluate; its training mode is restored.
        images: images to predict.
        accelerator: accelerator with the device, the precision and the processes.
        batch_size: batch size of each process.
        workers: number of worker processes that load images.

    Returns:
        Logits (N, classes) in the order of the images, and labels (N,), both on the CPU.
    """
    was_training = model.training
    model.eval()
    batches = torch.arange(len(images)).split(batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    logits = torch.zeros(len(images), cast(int, model.num_classes), device=accelerator.device)
    loaded = images.batches(mine, accelerator.device, workers)
    with accelerator.autocast(), contextlib.closing(loaded):
        for indices, (x, _) in zip(mine, loaded, strict=True):
            logits[indices] = model(plain(x, pixels_of(model))).float()
    model.train(was_training)
    # every process filled only its own rows; the rest are zero
    return accelerator.reduce(logits).cpu(), images.labels.cpu()


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Compute the accuracy of logits (N, classes) against labels (N,), in float64."""
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    shares = best[:, 0].double().mean().item(), best.any(1).double().mean().item()
    return Accuracy(*shares, F.cross_entropy(logits.double(), labels).item())
