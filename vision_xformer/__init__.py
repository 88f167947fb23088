"""Image classifiers whose stem, backbone and token mixer are chosen independently."""

from . import compat, hub
from .backbones import BACKBONES, Block, Config, Stage, VisionModel
from .backbones.cait import CaiT
from .backbones.cct import CCT, CVTLite, ViTLite
from .backbones.convmixer import ConvMixer
from .backbones.crossformer import CrossFormer
from .backbones.crossvit import CrossViT
from .backbones.cvt import CvT
from .backbones.feature_net import FeatureNet
from .backbones.levit import LeViT
from .backbones.mlp_mixer import GMLP, MlpMixer
from .backbones.pvt import PVT
from .backbones.simple_vit import SimpleViT
from .backbones.swin import Swin
from .backbones.vit import ViT
from .backbones.xcit import XCiT
from .compat import FNet, FNet2D, ViL, ViN, ViP
from .converters import (
    BreakEven,
    Comparison,
    Report,
    align,
    compare,
    convert,
    load_converted,
    register_transformers,
    revert,
    save_converted,
)
from .explain import attention_heat, attention_maps, overlay, rollout
from .factory import create_model, load_model, save_model
from .flops import count_flops
from .grid import TokenGrid
from .hub import from_pretrained
from .kernels import KERNELS, Kernel, Site
from .kernels.linformer import Linformer
from .kernels.nystrom import Nystrom
from .kernels.performer import Performer, redraw_features
from .kernels.softmax import Softmax
from .memory_use import Memory, memory
from .mixers import MIXERS, Mixer, create_mixer, list_mixers, mixer_options
from .mixers.attention import Attention, Projection
from .mixers.fourier import Fourier
from .names import list_models
from .onnx_export import export_onnx
from .stems import STEMS, Stem
from .version import __version__
from .weights import LoadReport, load_weights

__all__ = [
    "BACKBONES",
    "CCT",
    "GMLP",
    "KERNELS",
    "MIXERS",
    "PVT",
    "STEMS",
    "Attention",
    "Block",
    "BreakEven",
    "CVTLite",
    "CaiT",
    "Comparison",
    "Config",
    "ConvMixer",
    "CrossFormer",
    "CrossViT",
    "CvT",
    "FNet",
    "FNet2D",
    "FeatureNet",
    "Fourier",
    "Kernel",
    "LeViT",
    "Linformer",
    "LoadReport",
    "Memory",
    "Mixer",
    "MlpMixer",
    "Nystrom",
    "Performer",
    "Projection",
    "Report",
    "SimpleViT",
    "Site",
    "Softmax",
    "Stage",
    "Stem",
    "Swin",
    "TokenGrid",
    "ViL",
    "ViN",
    "ViP",
    "ViT",
    "ViTLite",
    "VisionModel",
    "XCiT",
    "__version__",
    "align",
    "attention_heat",
    "attention_maps",
    "compare",
    "compat",
    "convert",
    "count_flops",
    "create_mixer",
    "create_model",
    "export_onnx",
    "from_pretrained",
    "hub",
    "list_mixers",
    "list_models",
    "load_converted",
    "load_model",
    "load_weights",
    "memory",
    "mixer_options",
    "overlay",
    "redraw_features",
    "register_transformers",
    "revert",
    "rollout",
    "save_converted",
    "save_model",
]
