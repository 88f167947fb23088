"""Configuration, presets and class of each backbone."""

from . import cct, cvt, fnet2d, levit, vit
from .base import BACKBONES, Backbone, Config

__all__ = ["BACKBONES", "Backbone", "Config", "cct", "cvt", "fnet2d", "levit", "vit"]
