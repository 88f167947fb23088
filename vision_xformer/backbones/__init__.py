"""Configuration, presets and class of each backbone."""

from ..registry import import_all
from .base import BACKBONES, Backbone, Config

__all__ = ["BACKBONES", "Backbone", "Config"]

import_all(__name__, __path__)
