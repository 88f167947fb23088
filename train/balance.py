"""Classes of different sizes: the order of an epoch, and weights in the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Splits


def epoch_order(labels: Tensor, balance: str, generator: torch.Generator) -> Tensor:
    """Draw the order of the images of an epoch.

    Args:
        labels: classes (N,) of the images.
        balance: ``data.balance``. With "sampler", each class has an equal share of the N images,
            to within one image; all images of a class are drawn once before any is repeated.
        generator: of the random numbers.

    Returns:
        Indices (N,): a permutation unless ``balance`` is "sampler".
    """
    if balance != "sampler":
        return torch.randperm(len(labels), generator=generator)
    members = [(labels.cpu() == label).nonzero()[:, 0] for label in labels.cpu().unique()]
    shares = torch.full((len(members),), len(labels) // len(members))
    shares[torch.randperm(len(members), generator=generator)[: len(labels) % len(members)]] += 1
    drawn = []
    for own, share in zip(members, shares.tolist(), strict=True):
        rounds = -(-share // len(own))
        draws = [own[torch.randperm(len(own), generator=generator)] for _ in range(rounds)]
        drawn.append(torch.cat(draws)[:share] if draws else own[:0])
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)]


def class_weights(data: Splits, balance: str, device: torch.device) -> Tensor | None:
    """Compute weights (classes,) of the loss by inverse frequency; their mean over images is 1.

    A class without images has weight 0.

    Args:
        data: whose training images are counted.
        balance: ``data.balance``; None is returned unless it is "loss".
        device: of the weights.
    """
    if balance != "loss":
        return None
    counts = torch.bincount(data.train.labels.to(device), minlength=len(data.classes))
    share = len(data.train) / int((counts > 0).sum())  # of each class if all had the same size
    return torch.where(counts > 0, share / counts.clamp(min=1), 0.0).float()


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    """Compute the mean cross-entropy, weighted by class.

    The weighted sum is divided by the number of images, not by the sum of their weights, so that
    the parts of a batch add up to the loss of the whole.

    Args:
        logits: (B, classes).
        targets: classes (B,), or probabilities (B, classes).
        weights: of each class (classes,), or None.
        smoothing: fraction of each target that is spread over all classes.
    """
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    total = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")
    return total / len(logits)
