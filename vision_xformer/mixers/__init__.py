"""Token mixers: what a block can hold."""

from ..registry import import_all
from .base import MIXERS, Mixer
from .factory import (
    create_mixer,
    is_fixed,
    list_mixers,
    mixer_options,
    takes_bias,
    takes_heads,
    takes_rope,
)

__all__ = [
    "MIXERS",
    "Mixer",
    "create_mixer",
    "is_fixed",
    "list_mixers",
    "mixer_options",
    "takes_bias",
    "takes_heads",
    "takes_rope",
]

import_all(__name__, __path__)
