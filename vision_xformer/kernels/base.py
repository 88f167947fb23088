"""What every kernel has: the arithmetic between projected operands, and nothing else.

Shapes: B batch, H heads, N queries, M keys, K key width per head, V value width per head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..registry import Registry


class Kernel(nn.Module):
    """Maps q (B, H, N, K), k (B, G, M, K), v (B, G, M, V) to (B, H, N, V). No projection inside.

    Subclasses add their options as keyword-only constructor arguments.

    Args:
        heads: number of query heads H.
        key_dim: key width per head K.
        layout: where the M keys lie; what is as long as the sequence (Linformer) is sized by it.

    Attributes:
        takes_rope: whether rotating q and k before the kernel means anything.
        takes_bias: whether :meth:`forward` takes ``bias`` (H, N, M), added to the logits: only a
            kernel that forms them can.
        takes_one_query: whether one query alone, that of a class token, gets what it would among
            others: not where queries are pooled.
        compresses: whether :meth:`compress` shortens keys and values. It is linear along the
            length, so it may be applied before the projection; it fixes the layout.
        kv_heads: number of key and value heads G: ``heads``, or 1 where all heads share them.
        share_kv: the values are the keys; no value projection exists.

    One may state its operations, see :func:`~vision_xformer.count_flops`: a method ``flops``,
    called as :meth:`forward` is.
    """

    takes_rope: ClassVar[bool] = True
    takes_bias: ClassVar[bool] = False
    takes_one_query: ClassVar[bool] = True
    compresses: ClassVar[bool] = False

    def __init__(self, heads: int, key_dim: int, layout: Layout) -> None:
        super().__init__()
        self.heads, self.key_dim, self.layout = heads, key_dim, layout
        self.kv_heads = heads
        self.share_kv = False

    def compress(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C), (B, M, C') -> (B, R, C), (B, R, C'): shorten along the length."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
    ) -> Tensor:
        raise NotImplementedError


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """At least float32, and float64 where the tensor is: the type to accumulate in."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which products keep their operands' type on the device of ``x``."""
    if x.device.type == "meta":  # shapes only: it has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


KERNELS: Registry[Kernel] = Registry("kernel")
