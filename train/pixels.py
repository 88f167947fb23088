"""Pixel statistics: mean and standard deviation by which images are normalized."""

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
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize images (B, C, H, W), uint8 or float, from 0 to 255; the result is float32."""
        if len(set(self)) == len(set(self.mean)) == len(set(self.std)) == 1:
            return x.float() / (255 * self.std[0]) - self.mean[0] / self.std[0]
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in self)
        return x.float() / (255 * std) - mean / std

    def for_channels(self, channels: int) -> Pixels:
        """Return the statistics for another number of channels.

        They are averaged for one channel and repeated for more channels, as the weights of a
        pretrained first layer are.
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
    """Return the statistics that a model expects; mean and std 0.5 if it does not state them."""
    found: Any = getattr(model, "pretrained_cfg", {})
    if "mean" not in found:
        return NAMED["half"]
    return Pixels(tuple(found["mean"]), tuple(found["std"]))


def set_pixels(model: nn.Module, pixels: Pixels) -> None:
    """Store the statistics that a model expects in its ``pretrained_cfg``."""
    known: Any = getattr(model, "pretrained_cfg", {})
    model.pretrained_cfg = {**known, **pixels._asdict()}  # type: ignore[assignment]


def pixels_of_weights(path: Path, name: str) -> Pixels | None:
    """Return the statistics that weights expect, or None if they are not known.

    They are read from the metadata of our files, or from the config.json next to files of the
    Hugging Face Hub, or looked up in timm if the file or the model has a timm name.

    Args:
        path: the file of weights.
        name: name of the model.

    Raises:
        ValueError: for a file that cannot be read.
    """
    found: Any = read_metadata(path)
    if "mean" in found:
        return Pixels(*(tuple(json.loads(found[key])) for key in Pixels._fields))
    beside = path.with_name("config.json")
    if beside.is_file():
        config = read_json(beside, dict)
        found = config.get("pretrained_cfg") or config  # older files have no such section
        if "mean" in found:
            return Pixels(*(_listed(found, key, beside) for key in Pixels._fields))
    for known in (path.stem, name.removeprefix("timm:") if name.startswith("timm:") else ""):
        try:
            timms = timm.get_pretrained_cfg(known)
        except RuntimeError:  # a tag that timm does not know
            continue
        if timms is not None:
            return Pixels(tuple(timms.mean), tuple(timms.std))
    return None


def _listed(config: dict[str, Any], key: str, path: Path) -> tuple[float, ...]:
    """Return one statistic of a configuration; raise a ValueError unless it lists numbers."""
    values = config.get(key)
    listed = values if isinstance(values, list) else []
    if not listed or not all(isinstance(value, int | float) for value in listed):
        raise ValueError(f"{path}: {key} {values} must be a list of numbers, one for each channel")
    return tuple(listed)
