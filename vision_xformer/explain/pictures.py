"""Heatmaps over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import check_at_least

if TYPE_CHECKING:
    from PIL.Image import Image

# Anchors of matplotlib's perceptually uniform color map "inferno", at equal distances.
_INFERNO = (
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51),
    (249, 140, 10), (249, 201, 50), (252, 255, 164),
)  # fmt: skip
_GAP = 4  # pixels between overlays


def overlay(
    images: Tensor,
    heat: Tensor,
    *,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    size: int = 224,
) -> Image:
    """Draw heatmaps over images: one row per image, with the image and then its overlays.

    Each heatmap is scaled from its smallest value to its 99th percentile and upsampled smoothly.

    Args:
        images: (B, C, H, W) of 1 or 3 channels, normalized by ``mean`` and ``std``.
        heat: (B, h, w), or (B, K, h, w) for K heatmaps per image; on any grid.
        mean: mean of the pixels (0 to 1), one value or one for each channel, such as that
            in the ``pretrained_cfg`` of a model.
        std: their standard deviation.
        size: length of the longer side of each overlay in pixels.

    Raises:
        ValueError: for tensors of other shapes, images or heat that are not finite, or a mean or
            standard deviation that is not a number.
    """
    sheet = columns(images, heat, mean=mean, std=std, size=size)
    sheet = F.pad(sheet, (0, _GAP, 0, _GAP), value=1.0).permute(2, 0, 3, 1, 4)
    return as_picture(sheet.flatten(3, 4).flatten(1, 2)[:, :-_GAP, :-_GAP])


def columns(
    images: Tensor,
    heat: Tensor,
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    size: int,
) -> Tensor:
    """Compute the tiles of :func:`overlay`: (B, 1 + K, 3, H, W) in [0, 1], on the CPU.

    Raises:
        ValueError: as for :func:`overlay`.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images.shape)} must be (B, 1 or 3, H, W)")
    heats = heat.unsqueeze(1) if heat.ndim == 3 else heat
    if heats.ndim != 4 or len(heats) != len(images):
        raise ValueError(
            f"heat of shape {tuple(heat.shape)} must be (B, h, w) or (B, K, h, w) for "
            f"{len(images)} images"
        )
    if not len(images) or not heats.numel():
        raise ValueError(f"there are no images or no heat in {tuple(heat.shape)}")
    for name, value in (("mean", mean), ("std", std)):
        if not _are_numbers(value):
            raise ValueError(f"{name} {value!r} must be one number, or one for each of 3 channels")
    for name, tensor in (("images", images), ("heat", heats)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite")
    check_at_least("size", size, 1)
    pixels = _pixels(images, mean, std, size)
    return torch.stack((pixels, *(_blend(pixels, heat) for heat in heats.unbind(1))), 1)


def as_picture(pixels: Tensor) -> Image:
    """Convert pixels (3, H, W) in [0, 1] to a PIL image."""
    from PIL import Image

    return Image.fromarray((pixels * 255).round().byte().movedim(0, -1).contiguous().numpy())


def _are_numbers(value: Any) -> bool:
    """Whether a value is 1 or 3 numbers."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    except (RuntimeError, TypeError, ValueError):
        return False
    return numbers.numel() in (1, 3) and bool(numbers.isfinite().all())


def _pixels(
    images: Tensor, mean: float | Sequence[float], std: float | Sequence[float], size: int
) -> Tensor:
    """Undo the normalization and resize: (B, C, H, W) -> (B, 3, H, W) in [0, 1] on the CPU."""
    x = images.detach().float().cpu()
    center, scale = (x.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    x = (x * scale + center).clamp(0, 1).expand(-1, 3, -1, -1)
    factor = size / max(x.shape[2:])
    shape = tuple(max(1, round(side * factor)) for side in x.shape[2:])
    return _resized(x, shape).clamp(0, 1)


def _blend(pixels: Tensor, heat: Tensor) -> Tensor:
    """Blend heat (B, h, w) over pixels (B, 3, H, W): the hotter, the more opaque."""
    h = heat.detach().float().cpu()
    low, high = (h.flatten(1).quantile(share, 1)[:, None, None] for share in (0, 0.99))
    h = (h - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    h = _resized(h.clamp(0, 1).unsqueeze(1), tuple(pixels.shape[2:])).clamp(0, 1)
    gray = pixels.mean(1, keepdim=True).expand_as(pixels)
    alpha = 0.25 + 0.5 * h
    return gray * 0.75 * (1 - alpha) + _colors(h) * alpha


def _colors(h: Tensor) -> Tensor:
    """Colors (B, 3, H, W) of heat (B, 1, H, W) in [0, 1]."""
    anchors = h.new_tensor(_INFERNO) / 255
    position = h.squeeze(1) * (len(anchors) - 1)
    below = position.long().clamp(max=len(anchors) - 2)
    share = (position - below).unsqueeze(-1)
    return ((1 - share) * anchors[below] + share * anchors[below + 1]).movedim(-1, 1)


def _resized(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, shape, mode="bicubic", antialias=True)
