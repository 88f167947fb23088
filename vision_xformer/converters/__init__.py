"""Replace the softmax attention of pretrained models by other kernels: convert, compare, align."""

from .align import AttentionMatching, FeatureMatching, align
from .compare import Comparison, compare
from .files import load_converted, save_converted
from .replace import convert, revert
from .report import BreakEven, Report
from .transformers_attention import register_transformers

__all__ = [
    "AttentionMatching",
    "BreakEven",
    "Comparison",
    "FeatureMatching",
    "Report",
    "align",
    "compare",
    "convert",
    "load_converted",
    "register_transformers",
    "revert",
    "save_converted",
]
