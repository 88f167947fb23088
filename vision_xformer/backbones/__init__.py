"""Configuration, presets and class of each backbone."""

from . import fnet2d, vit
from .base import BACKBONES, Backbone, Config

__all__ = ["BACKBONES", "Backbone", "Config", "fnet2d", "vit"]
