"""Pixel statistics: what is subtracted from images and what divides them, per channel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from vision_xformer.weights import read_metadata

from .atomic import read_json


class Pixels(NamedTuple):
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize images (B, C, H, W), uint8 or float, from 0 to 255; the result is float32."""
        if len(set(self)) == len(set(self.mean)) == len(set(self.std)) == 1:
            return x.float() / (255 * self.std[0]) - self.mean[0] / self.std[0]
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in self)
        return x.float() / (255 * std) - mean / std

    def for_channels(self, channels: int) -> Pixels:
        """The same for images of another number of channels.

        One channel has the averages; more channels repeat those that are known, as the first layer
        of pretrained weights does.
        """
        if channels == 1:
            return Pixels(*((sum(v) / len(v),) for v in self))
        return Pixels(*(tuple(v[i % len(v)] for i in range(channels)) for v in self))

    def __str__(self) -> str:
        mean, std = (" ".join(f"{v:.3g}" for v in values) for values in self)
        return f"mean {mean}, std {std}"


NAMED = {
    "imagenet": Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": Pixels((0.5,), (0.5,)),
    "none": Pixels((0.0,), (1.0,)),
}


def pixels_of(model: nn.Module) -> Pixels:
    """The statistics that a model expects; half of the range if it does not say."""
    found: Any = getattr(model, "pretrained_cfg", {})
    if "mean" not in found:
        return NAMED["half"]
    return Pixels(tuple(found["mean"]), tuple(found["std"]))


def set_pixels(model: nn.Module, pixels: Pixels) -> None:
    """Let a model say which statistics it expects."""
    known: Any = getattr(model, "pretrained_cfg", {})
    model.pretrained_cfg = {**known, **pixels._asdict()}  # type: ignore[assignment]


def pixels_of_weights(path: Path, name: str) -> Pixels | None:
    """The statistics that weights expect, or None if their origin does not say.

    They are in the metadata of our files, and in the config.json next to those of the Hugging Face
    Hub; otherwise the file or the model may be called by a name of timm.

    Args:
        path: the file of weights.
        name: name of the model.
    """
    found: Any = read_metadata(path)
    if "mean" in found:
        return Pixels(*(tuple(json.loads(found[key])) for key in Pixels._fields))
    beside = path.with_name("config.json")
    if beside.is_file():
        config = read_json(beside, dict)
        found = config.get("pretrained_cfg") or config  # older ones have no part for it
        if "mean" in found:
            return Pixels(tuple(found["mean"]), tuple(found["std"]))
    for known in (path.stem, name.removeprefix("timm:") if name.startswith("timm:") else ""):
        try:
            timms = timm.get_pretrained_cfg(known)
        except RuntimeError:  # a tag that timm does not know
            continue
        if timms is not None:
            return Pixels(tuple(timms.mean), tuple(timms.std))
    return None
