"""Configuration, sizes and class of each backbone."""

from ..registry import import_all
from .base import BACKBONES, Block, Stage, VisionModel
from .config import Config

__all__ = ["BACKBONES", "Block", "Config", "Stage", "VisionModel"]

import_all(__name__, __path__)
