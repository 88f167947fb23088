"""Adapters to the attention layers of other libraries: how to compute q, k and v, and use y.

An adapter is selected by the class of a module. The class of a converted layer is a subclass of its
original class, with the same parameters under the same names, whose ``forward`` calls ``kernel``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Kernel
from ..kernels.base import merge_heads, split_heads
from ..kernels.softmax import Softmax, SoftmaxEager
from ..mixers.attention import Attention


class RefusedError(ValueError):
    """Raised for a layer that cannot be converted; the message states the reason."""


class Heads(NamedTuple):
    """The attention of a layer.

    Attributes:
        heads: number of heads H.
        key_dim: width of queries and keys per head K.
        value_dim: width of values per head V.
        scale: factor of the logits.
        dropout: probability of dropping an attention weight in training.
        weight: a parameter with the device and dtype of the layer.
    """

    heads: int
    key_dim: int
    value_dim: int
    scale: float
    dropout: float
    weight: Tensor


class Adapter:
    """Converts attention layers of one kind. Each method takes the layer.

    Attributes:
        classes: qualified names of the classes that it converts.
        forward: the ``forward`` of a converted layer, for adapters that replace it.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    forward: ClassVar[Callable[..., Any]]

    def matches(self, layer: nn.Module) -> bool:
        """Whether the layer is an instance of one of the classes and inherits their ``forward``."""
        forward = getattr(type(layer), "forward", None)
        return any(
            f"{c.__module__}.{c.__qualname__}" in self.classes
            and getattr(c, "forward", None) is forward
            for c in type(layer).__mro__
        )

    def heads(self, layer: Any) -> Heads:
        """Describe the layer.

        Raises:
            RefusedError: for a layer that cannot be converted.
        """
        raise NotImplementedError

    def trained(self, layer: Any) -> Iterator[nn.Module | nn.Parameter]:
        """Yield the parts before the kernel: projections to q, k and v, and norms of q and k."""
        raise NotImplementedError

    def install(self, layer: Any, kernel: Kernel) -> None:
        """Make the layer call the kernel."""
        layer.kernel = kernel
        layer.__class__ = _converted_class(type(layer), type(self))

    def remove(self, layer: Any) -> None:
        """Undo :meth:`install`."""
        layer.__class__ = type(layer).original
        del layer.kernel

    def is_converted(self, layer: nn.Module) -> bool:
        """Whether :meth:`install` was called for the layer."""
        return getattr(type(layer), "adapter", None) is type(self)


_CLASSES: dict[tuple[type[nn.Module], type[Adapter]], type[nn.Module]] = {}


def _converted_class(original: type[nn.Module], adapter: type[Adapter]) -> type[nn.Module]:
    """Return the subclass of a layer's class with the ``forward`` of the adapter."""
    if (known := _CLASSES.get((original, adapter))) is not None:
        return known

    def reduce(layer: Any, protocol: int) -> tuple[Any, ...]:  # pickle cannot import this class
        return _new, (original, adapter), layer.__dict__

    members = {
        "forward": adapter.forward,
        "original": original,
        "adapter": adapter,
        "__reduce_ex__": reduce,
    }
    made = type(f"Converted{original.__name__}", (original,), members)
    return _CLASSES.setdefault((original, adapter), made)


def _new(original: type[nn.Module], adapter: type[Adapter]) -> nn.Module:
    """Return an empty layer for unpickling and copying to fill."""
    cls = _converted_class(original, adapter)
    return cls.__new__(cls)


def refuse_mask(layer: Any, mask: object, is_causal: bool = False) -> None:
    """Raise a ValueError if a converted layer is called with a mask."""
    if mask is not None or is_causal:
        what = "causal" if mask is None else "called with a mask"
        kernel = type(layer.kernel.inner).__name__
        raise ValueError(
            f"{type(layer).__name__} is converted and {what}: its kernel {kernel} has no attention "
            "map to mask; vx.revert(model) restores softmax"
        )


class OwnAttention(Adapter):
    """Attention of this package: the kernel is replaced."""

    classes = ("vision_xformer.mixers.attention.Attention",)

    def heads(self, layer: Attention) -> Heads:
        """See :class:`Adapter`."""
        if not isinstance(layer.kernel, Softmax | SoftmaxEager):
            raise RefusedError(f"its kernel is {type(layer.kernel).__name__}, not softmax")
        if layer.position_bias is not None:
            raise RefusedError("it adds a position bias to the attention map")
        weight = next(layer.proj.parameters())
        site = layer.kernel.site
        scale, dropout = site.key_dim**-0.5, layer.kernel.dropout
        return Heads(site.heads, site.key_dim, site.value_dim, scale, dropout, weight)

    def trained(self, layer: Attention) -> Iterator[nn.Module]:
        """See :class:`Adapter`."""
        yield layer.projection

    def install(self, layer: Any, kernel: Kernel) -> None:
        """See :class:`Adapter`."""
        layer.__dict__["softmax"] = layer.kernel  # not a submodule: it has no parameters
        layer.kernel = kernel

    def remove(self, layer: Any) -> None:
        """See :class:`Adapter`."""
        layer.kernel = layer.__dict__.pop("softmax").train(layer.training)

    def is_converted(self, layer: nn.Module) -> bool:
        """See :class:`Adapter`."""
        return "softmax" in layer.__dict__


def _torch_forward(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Attend, (B, N, D) -> (B, N, D); the attention weights returned are None."""
    refuse_mask(layer, attn_mask if key_padding_mask is None else key_padding_mask, is_causal)
    if key is not query or value is not query:
        raise ValueError(
            "a converted MultiheadAttention is self-attention: query, key and value must be "
            "one tensor, not three"
        )
    x = query if layer.batch_first else query.transpose(0, 1)
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    q, k, v = (split_heads(part, layer.num_heads) for part in qkv.chunk(3, -1))
    y = layer.out_proj(merge_heads(layer.kernel(q, k, v)))
    return (y if layer.batch_first else y.transpose(0, 1)), None


class TorchAttention(Adapter):
    """``nn.MultiheadAttention`` of a vision transformer of torchvision or open_clip."""

    classes = ("torch.nn.modules.activation.MultiheadAttention",)

    forward: ClassVar[Callable[..., Any]] = staticmethod(_torch_forward)

    def heads(self, layer: nn.MultiheadAttention) -> Heads:
        """See :class:`Adapter`."""
        if not layer._qkv_same_embed_dim:
            raise RefusedError(
                "its keys and values have other widths than its queries, as in cross-attention"
            )
        if layer.bias_k is not None or layer.add_zero_attn:
            raise RefusedError("it appends keys and values (add_bias_kv or add_zero_attn)")
        width = layer.head_dim
        scale, weight = width**-0.5, layer.in_proj_weight
        return Heads(layer.num_heads, width, width, scale, layer.dropout, weight)

    def trained(self, layer: nn.MultiheadAttention) -> Iterator[nn.Parameter]:
        """See :class:`Adapter`."""
        yield layer.in_proj_weight
        if layer.in_proj_bias is not None:
            yield layer.in_proj_bias


def _plain_forward(layer: Any, x: Tensor, attn_bias: Any = None) -> Tensor:
    """Attend, (B, N, D) -> (B, N, D)."""
    refuse_mask(layer, attn_bias)
    y = layer.kernel(*PlainAttention.operands(layer, x))
    return layer.proj_drop(layer.proj(merge_heads(y)))


class PlainAttention(Adapter):
    """Attention with ``qkv`` and ``proj`` as in early versions of timm, DINO, DINOv2 and MAE.

    There are many such classes, so a layer is recognized by its output: on random tokens it must
    equal softmax attention with its ``qkv`` and ``proj``.
    """

    forward: ClassVar[Callable[..., Any]] = staticmethod(_plain_forward)

    def matches(self, layer: nn.Module) -> bool:
        """Whether the layer has these attributes; :meth:`heads` compares the outputs."""
        qkv, proj = getattr(layer, "qkv", None), getattr(layer, "proj", None)
        return (
            isinstance(qkv, nn.Linear)
            and isinstance(proj, nn.Linear)
            and qkv.out_features == 3 * proj.in_features
            and isinstance(getattr(layer, "num_heads", None), int)
        )

    @torch.no_grad()
    def heads(self, layer: Any) -> Heads:
        """See :class:`Adapter`."""
        width = layer.proj.in_features // layer.num_heads
        drop = getattr(layer, "attn_drop", 0.0)
        dropout = float(drop.p if isinstance(drop, nn.Dropout) else drop)
        scale, weight = getattr(layer, "scale", width**-0.5), layer.qkv.weight
        last = getattr(layer, "proj_drop", None)
        if not isinstance(scale, float) or not isinstance(last, nn.Module):
            raise RefusedError("it has no float scale or no proj_drop, unlike attention in DINOv2")
        found = Heads(layer.num_heads, width, width, scale, dropout, weight)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 12, layer.qkv.in_features, generator=generator, device="cpu")
        try:
            exact = copy.deepcopy(layer).to("cpu", torch.float32).eval()  # of any precision
            theirs = exact(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RefusedError(f"it fails on tokens (B, N, D) alone: {error}") from error
        q, k, v = self.operands(exact, x)
        attend = F.scaled_dot_product_attention
        ours = exact.proj(merge_heads(attend(q, k, v, scale=scale)))
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            raise RefusedError("it does not return tokens (B, N, D)")
        if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4 * ours.abs().amax().item()):
            raise RefusedError(
                "its output differs from that of softmax attention with its qkv and proj"
            )
        return found

    @staticmethod
    def operands(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, H, N, K) of tokens (B, N, D)."""
        return tuple(split_heads(part, layer.num_heads) for part in layer.qkv(x).chunk(3, -1))

    def trained(self, layer: Any) -> Iterator[nn.Module]:
        """See :class:`Adapter`."""
        yield layer.qkv
