"""Attention layers of timm: ``Attention``, ``AttentionRope`` and ``EvaAttention``.

``Attention`` is used in ViT, DeiT, DINOv2, SigLIP, CLIP, MAE and AugReg, the others in EVA and
DINOv3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.base import merge_heads, split_heads
from .adapters import Adapter, Heads, RefusedError, refuse_mask


def _finish(layer: Any, y: Tensor, gate: Tensor | None) -> Tensor:
    """Map y (B, H, N, V) to tokens (B, N, D) by the norm, the gate and the output layer."""
    x = layer.norm(merge_heads(y))
    if gate is not None:
        x = x * gate
    return layer.proj_drop(layer.proj(x))


def _gate(layer: Any, x: Tensor) -> Tensor | None:
    return None if layer.gate is None else layer.gate(x).sigmoid()


def _timm_forward(
    layer: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attend, (B, N, D) -> (B, N, D)."""
    refuse_mask(layer, attn_mask, is_causal)
    q, k, v = (split_heads(part, layer.num_heads) for part in layer.qkv(x).chunk(3, -1))
    y = layer.kernel(layer.q_norm(q), layer.k_norm(k), v)
    return _finish(layer, y, _gate(layer, x))


class TimmAttention(Adapter):
    """``timm.layers.Attention``."""

    classes: ClassVar[tuple[str, ...]] = ("timm.layers.attention.Attention",)

    forward: ClassVar[Callable[..., Any]] = staticmethod(_timm_forward)

    def heads(self, layer: Any) -> Heads:
        """See :class:`Adapter`."""
        weight = next(layer.proj.parameters())
        width = layer.attn_dim // layer.num_heads if hasattr(layer, "attn_dim") else layer.head_dim
        return Heads(layer.num_heads, width, width, layer.scale, layer.attn_drop.p, weight)

    def trained(self, layer: Any) -> Iterator[nn.Module | nn.Parameter]:
        """See :class:`Adapter`."""
        yield from (layer.qkv, layer.q_norm, layer.k_norm)


def _rotary_forward(
    layer: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attend, (B, N, D) -> (B, N, D); all tokens except the prefix are rotated."""
    from timm.layers import apply_rot_embed_cat

    refuse_mask(layer, attn_mask, is_causal)
    q, k, v = (split_heads(part, layer.num_heads) for part in _project(layer, x))
    q, k = layer.q_norm(q), layer.k_norm(k)
    if rope is not None:
        half, prefix = getattr(layer, "rotate_half", False), layer.num_prefix_tokens

        def rotated(t: Tensor) -> Tensor:
            patches = apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)
            return torch.cat((t[:, :, :prefix], patches), 2).to(v)

        q, k = rotated(q), rotated(k)
    return _finish(layer, layer.kernel(q, k, v), _gate(layer, x))


class TimmRotary(TimmAttention):
    """``timm.layers.AttentionRope`` and ``timm.models.eva.EvaAttention``."""

    classes: ClassVar[tuple[str, ...]] = (
        "timm.layers.attention.AttentionRope",
        "timm.models.eva.EvaAttention",
    )

    forward: ClassVar[Callable[..., Any]] = staticmethod(_rotary_forward)

    def heads(self, layer: Any) -> Heads:
        """See :class:`Adapter`."""
        if getattr(layer, "num_kv_groups", 1) > 1:
            raise RefusedError(f"{layer.num_kv_groups} query heads share keys and values")
        return super().heads(layer)

    def trained(self, layer: Any) -> Iterator[nn.Module | nn.Parameter]:
        """See :class:`Adapter`."""
        maps = (layer.q_proj, layer.k_proj, layer.v_proj) if layer.qkv is None else (layer.qkv,)
        yield from (*maps, layer.q_norm, layer.k_norm)
        yield from (b for n in ("q_bias", "v_bias") if (b := getattr(layer, n, None)) is not None)


def _project(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, N, H K) of tokens (B, N, D)."""
    if layer.qkv is None:
        return layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    if getattr(layer, "q_bias", None) is None:
        return layer.qkv(x).chunk(3, -1)
    bias = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
    return (layer.qkv(x) + bias).chunk(3, -1)
