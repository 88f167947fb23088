"""Unbalanced classes: sampling with equal class frequencies, and class weights in the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Splits

SHUFFLE_BUFFER = 20_000  # images, from a few shards, that are shuffled together


def epoch_order(
    labels: Tensor, balance: str, generator: torch.Generator, shards: Tensor | None = None
) -> Tensor:
    """Draw the order of the images of an epoch.

    Args:
        labels: classes (N,) of the images.
        balance: ``data.balance``. With "sampler", each class has an equal share of the N images,
            to within one image; all images of a class are drawn once before any is repeated.
        generator: source of the random numbers.
        shards: numbers (N,) of the shards that contain the images. If given, whole shards are
            shuffled, and then images within a buffer, so that only a few are read at a time.

    Returns:
        Indices (N,): a permutation unless ``balance`` is "sampler".
    """
    if balance != "sampler":
        return _shuffled(torch.arange(len(labels)), generator, shards)
    members = [(labels.cpu() == label).nonzero()[:, 0] for label in labels.cpu().unique()]
    shares = torch.full((len(members),), len(labels) // len(members))
    shares[torch.randperm(len(members), generator=generator)[: len(labels) % len(members)]] += 1
    drawn = []
    for own, share in zip(members, shares.tolist(), strict=True):
        rounds = -(-share // len(own))
        draws = [own[torch.randperm(len(own), generator=generator)] for _ in range(rounds)]
        drawn.append(torch.cat(draws)[:share] if draws else own[:0])
    return _shuffled(torch.cat(drawn), generator, shards)


def _shuffled(drawn: Tensor, generator: torch.Generator, shards: Tensor | None) -> Tensor:
    """Shuffle indices of images: all of them, or shard by shard within a buffer."""
    if shards is None:
        return drawn[torch.randperm(len(drawn), generator=generator)]
    ranks = torch.randperm(int(shards.max()) + 1, generator=generator)
    drawn = drawn[ranks[shards[drawn]].argsort(stable=True)]
    # A shuffle buffer as a sort: each image is delayed by up to as many images as the buffer has.
    delays = SHUFFLE_BUFFER * torch.rand(len(drawn), generator=generator, dtype=torch.float64)
    return drawn[(torch.arange(len(drawn)) + delays).argsort()]


def class_weights(data: Splits, balance: str, device: torch.device) -> Tensor | None:
    """Compute class weights (classes,) by inverse frequency; their mean over images is 1.

    A class without images has weight 0.

    Args:
        data: data sets; the training images are counted.
        balance: ``data.balance``.
        device: of the weights.

    Returns:
        The weights, or None unless ``balance`` is "loss".
    """
    if balance != "loss":
        return None
    counts = torch.bincount(data.train.labels.to(device), minlength=len(data.classes))
    share = len(data.train) / int((counts > 0).sum())  # images per class if balanced
    return torch.where(counts > 0, share / counts.clamp(min=1), 0.0).float()


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    """Compute the mean cross-entropy, weighted by class.

    The weighted sum is divided by the number of images, not by the sum of their weights, so that
    the mean over the parts of a batch is the loss of the whole batch.

    Args:
        logits: (B, classes).
        targets: classes (B,), or probabilities (B, classes).
        weights: class weights (classes,), or None.
        smoothing: fraction of each target that is spread over all classes.
    """
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    total = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")
    return total / len(logits)
