"""Predictions of a whole set of images, and how good they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

import vision_xformer as vx

from .augment import plain
from .data import Images


class Accuracy(NamedTuple):
    """Shares of all images; ``top5`` is over as many classes as there are, if fewer."""

    top1: float
    top5: float
    loss: float


@torch.no_grad()
def predict(
    model: vx.VisionModel,
    images: Images,
    accelerator: Accelerator,
    batch_size: int,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) of all images in order, and their classes (N,), on the CPU.

    Every image counts once, whatever the batches and processes.
    """
    was_training = model.training
    model.eval()
    batches = torch.arange(len(images)).split(batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    logits = torch.zeros(len(images), model.config.num_classes, device=accelerator.device)
    with accelerator.autocast():
        loaded = images.batches(mine, accelerator.device, workers)
        for indices, (x, _) in zip(mine, loaded, strict=True):
            logits[indices] = model(plain(x)).float()
    model.train(was_training)
    # each process filled its rows of zeros
    return accelerator.reduce(logits).cpu(), images.labels.cpu()


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Exact shares and mean cross-entropy."""
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    shares = best[:, 0].double().mean().item(), best.any(1).double().mean().item()
    return Accuracy(*shares, F.cross_entropy(logits.double(), labels).item())
