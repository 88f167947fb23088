"""Augmentation of whole batches on their device, with independent draws for each image.

Random draws are made separately from their application: every process draws for the whole batch and
keeps the rows of its own images, so the result does not depend on the number of processes. Only
policies and mixing are drawn per process.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from .config import AugmentConfig
from .pixels import NAMED, Pixels

_SHARING = 4  # images that share the draws of a policy, for fewer and larger calls


def plain(x: Tensor, pixels: Pixels = NAMED["half"]) -> Tensor:
    """Normalize images without augmentation.

    Args:
        x: images (B, C, H, W), uint8 or float, from 0 to 255.
        pixels: pixel statistics to normalize by.

    Returns:
        Images (B, C, H, W), float32; by default in [-1, 1].
    """
    return pixels.normalize(x)


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Draw the random numbers for ``count`` images.

    Their number does not depend on which augmentations are enabled.

    Returns:
        Uniform draws in [0, 1), (count, 10).
    """
    return torch.rand(count, 10, generator=generator)


def augment(
    x: Tensor, draws: Tensor, config: AugmentConfig, mirror: bool, pixels: Pixels = NAMED["half"]
) -> Tensor:
    """Augment and normalize a batch of images.

    Applies random crops and horizontal flips, a policy of torchvision, jitter of brightness and
    saturation, and random erasing, as configured. The policy draws from PyTorch's global generator.

    Args:
        x: images (B, C, H, W), uint8.
        draws: random numbers (B, 10) from :func:`draw`.
        config: augmentations to apply.
        mirror: whether the dataset allows horizontal flips.
        pixels: pixel statistics to normalize by.

    Returns:
        Images (B, C, H, W), float32; by default in [-1, 1].
    """
    draws = draws.to(x.device)
    if config.crop or (config.flip and mirror):
        x = _crop_and_flip(x, draws[:, :3], config.crop, config.flip and mirror)
    if config.policy != "none":
        policy = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[config.policy]()
        x = torch.cat([policy(part) for part in x.split(_SHARING)])
    y = x.float()
    if config.color:
        y = _color(y, 1 + config.color * (2 * draws[:, 3:5] - 1))
    y = plain(y, pixels)
    return _erase(y, draws[:, 5:], config.erasing) if config.erasing else y


def _crop_and_flip(x: Tensor, draws: Tensor, crop: bool, flip: bool) -> Tensor:
    """Pad by an eighth, crop to the original size and flip, in one gather per axis."""
    count, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device).expand(count, -1)
    columns = torch.arange(width, device=x.device).expand(count, -1)
    if flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    if crop:
        pads = max(1, height // 8), max(1, width // 8)
        x = F.pad(x, (pads[1], pads[1], pads[0], pads[0]))
        rows = rows + (draws[:, :1] * (2 * pads[0] + 1)).long()
        columns = columns + (draws[:, 1:2] * (2 * pads[1] + 1)).long()
    x = x.gather(2, rows[:, None, :, None].expand(-1, channels, -1, x.shape[3]))
    return x.gather(3, columns[:, None, None].expand(-1, channels, height, -1))


def _color(x: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness and saturation of x (B, C, H, W) in [0, 255] by factors (B, 2)."""
    brightness, saturation = factors[:, :, None, None, None].unbind(1)
    x = x * brightness
    gray = x.mean(1, keepdim=True)
    return (gray + saturation * (x - gray)).clamp(0, 255)


def _erase(x: Tensor, draws: Tensor, share: float) -> Tensor:
    """Zero a rectangle of 2 to 33% of the area in a share of the images (Zhong et al. 2017)."""
    height, width = x.shape[2:]
    chosen, size, shape, down, right = draws.unbind(1)
    area = 0.02 + 0.31 * size
    aspect = torch.exp(math.log(0.3) * (1 - 2 * shape))
    tall = (area * aspect).sqrt().clamp(max=1) * height
    wide = (area / aspect).sqrt().clamp(max=1) * width
    top, left = down * (height - tall), right * (width - wide)
    rows = torch.arange(height, device=x.device) + 0.5
    columns = torch.arange(width, device=x.device) + 0.5
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    erased = in_rows[:, :, None] & in_columns[:, None] & (chosen < share)[:, None, None]
    return x.masked_fill(erased[:, None], 0)


def mixing(config: AugmentConfig, classes: int) -> Any:
    """Build the mixing transform of a batch and its labels.

    Args:
        config: strengths of MixUp and CutMix; 0 disables either.
        classes: number of classes.

    Returns:
        MixUp, CutMix or a random choice of both; None if both are disabled.
    """
    kinds: list[Any] = []
    if config.mixup:
        kinds.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        kinds.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    return v2.RandomChoice(kinds) if kinds else None
