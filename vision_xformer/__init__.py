"""Vision classifiers whose stem, backbone and token mixer are chosen apart."""

from .backbones import BACKBONES, Backbone, Config
from .flops import count_flops
from .kernels import KERNELS, Kernel
from .layout import Layout
from .mixers import (
    MIXERS,
    ClassSlot,
    ConvSlot,
    Mixer,
    NormSlot,
    Slot,
    WindowSlot,
    create_mixer,
    list_mixers,
    mixer_options,
)
from .published import (
    FNet,
    FNet2D,
    HybridFNet,
    HybridViL,
    HybridViN,
    HybridViP,
    HybridViT,
    ViL,
    ViN,
    ViP,
    ViT,
)
from .saving import load_model, save_model
from .stems import STEMS, Stem
from .version import __version__
from .weights import LoadReport, load_weights
from .zoo import create_model, list_models

__all__ = [
    "BACKBONES",
    "KERNELS",
    "MIXERS",
    "STEMS",
    "Backbone",
    "ClassSlot",
    "Config",
    "ConvSlot",
    "FNet",
    "FNet2D",
    "HybridFNet",
    "HybridViL",
    "HybridViN",
    "HybridViP",
    "HybridViT",
    "Kernel",
    "Layout",
    "LoadReport",
    "Mixer",
    "NormSlot",
    "Slot",
    "Stem",
    "ViL",
    "ViN",
    "ViP",
    "ViT",
    "WindowSlot",
    "__version__",
    "count_flops",
    "create_mixer",
    "create_model",
    "list_mixers",
    "list_models",
    "load_model",
    "load_weights",
    "mixer_options",
    "save_model",
]
