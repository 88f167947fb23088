"""Attention layers of transformers, converted through its ``AttentionInterface``.

The ``attn_implementation`` of a converted model calls the kernels of converted layers and the
original implementation for other layers; the classes of transformers are not changed.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels import KERNELS, Site
from ..options import check_options, options_of
from .adapters import Adapter, Heads, RefusedError, refuse_mask
from .tokens import ConvertedKernel, GridTracker, needs_centered_keys

_OVER = "vision_xformer_over_"
_CLASSES = {
    "vit": "ViTAttention",
    "deit": "DeiTAttention",
    "ijepa": "IJepaAttention",
    "vit_mae": "ViTMAEAttention",
    "dinov2": "Dinov2Attention",
    "dinov2_with_registers": "Dinov2WithRegistersAttention",
    "dinov3_vit": "DINOv3ViTAttention",
    "siglip": "SiglipAttention",
    "clip": "CLIPAttention",
}


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend with the kernel of a converted layer, as transformers calls it.

    Shape: (B, H, N, K), (B, H, N, K), (B, H, N, V) -> (B, N, H, V)
    """
    refuse_mask(module, attention_mask, bool(is_causal))
    return module.kernel(query, key, value).transpose(1, 2).contiguous(), None


def _attention_over(before: str, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Attend with the kernel of a converted layer, or else with implementation ``before``."""
    from transformers import AttentionInterface

    if hasattr(module, "kernel"):
        return attention(module, *args, **kwargs)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    implementation = AttentionInterface().get_interface(before, eager)
    found: tuple[Tensor, Any] = implementation(module, *args, **kwargs)
    return found


def _mask_of_padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Return a mask only if the caller gives one; transformers adds one to exported models."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    kwargs["attention_mask"] = attention_mask
    return sdpa_mask(*args, **kwargs)


def register_over(before: str) -> str:
    """Register the implementation that calls kernels, or else ``before``, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _OVER + before
    AttentionInterface.register(name, functools.partial(_attention_over, before))
    AttentionMaskInterface.register(name, _mask_of_padding)
    return name


class _Installed:
    """Forward pre-hook of a converted layer, which makes sure that its kernel is called.

    Layers and models share a configuration, whose implementation may be set, or be reset by
    another model. The hook is pickled with the layer, and registers it in another process.

    Args:
        before: the implementation of other layers.
    """

    def __init__(self, before: str) -> None:
        self.before = before

    def __call__(self, layer: Any, args: Any) -> None:
        now = layer.config._attn_implementation
        if not now.startswith(_OVER):  # the setter checks known names
            layer.config._attn_implementation_internal = register_over(now)
            self.before = now

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register_over(self.before)


class TransformersAttention(Adapter):
    """Attention of nine vision models of transformers."""

    classes = tuple(
        f"transformers.models.{family}.modeling_{family}.{name}"
        for family, name in _CLASSES.items()
    )

    def heads(self, layer: Any) -> Heads:
        """See :class:`Adapter`."""
        width: int = layer.head_dim
        weight = next(layer.q_proj.parameters())
        heads, scale = layer.q_proj.out_features // width, _first(layer, "scaling", "scale")
        if layer.k_proj.out_features != layer.q_proj.out_features:
            raise RefusedError("several query heads share keys and values")
        dropout = _first(layer, "attention_dropout", "dropout")
        return Heads(heads, width, width, float(scale), float(dropout), weight)

    def trained(self, layer: Any) -> Iterator[nn.Module]:
        """See :class:`Adapter`."""
        yield from (layer.q_proj, layer.k_proj, layer.v_proj)

    def install(self, layer: Any, kernel: nn.Module) -> None:
        """See :class:`Adapter`."""
        layer.kernel = kernel
        before = layer.config._attn_implementation.removeprefix(_OVER)
        layer.register_forward_pre_hook(_Installed(before))
        layer.config._attn_implementation_internal = register_over(before)

    def remove(self, layer: Any) -> None:
        """See :class:`Adapter`."""
        del layer.kernel
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, _Installed):
                del layer._forward_pre_hooks[key]
        before = layer.config._attn_implementation.removeprefix(_OVER)
        layer.config._attn_implementation_internal = before

    def is_converted(self, layer: nn.Module) -> bool:
        """See :class:`Adapter`."""
        kernel = getattr(layer, "kernel", None)  # that of register_transformers is not installed
        return self.matches(layer) and "image_size" in getattr(kernel, "recipe", {})


def _first(layer: Any, *names: str) -> Any:
    """Return the first of several attributes that the layer has."""
    return next(value for n in names if (value := getattr(layer, n, None)) is not None)


def register_transformers(mixer: str | None = None, **options: Any) -> list[str]:
    """Register kernels as ``attn_implementation`` of transformers: "vx_nystrom", "vx_linear", ...

    Each layer creates its kernel when it is first called; if the kernel has weights, they are new.
    To train, save or load them, use :func:`convert`. If the number of tokens differs from that of
    the model's configuration, images are assumed to be square. Models other than the nine that
    :func:`convert` supports, and calls with a mask, raise an error.

    Args:
        mixer: the kernel; None registers all kernels.
        options: of that kernel.

    Returns:
        The registered names.

    Raises:
        ValueError: for an unknown kernel or option, or if transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ValueError(
            "register_transformers needs the package transformers: pip install transformers"
        ) from error
    if mixer is None and options:
        raise ValueError(f"options {sorted(options)} need the name of the kernel that takes them")
    for name in (names := KERNELS.names() if mixer is None else [mixer]):
        check_options(f"kernel {name!r}", options, options_of(KERNELS[name]))
        AttentionInterface.register(f"vx_{name}", functools.partial(_attention_of, name, options))
        AttentionMaskInterface.register(f"vx_{name}", _mask_of_padding)
    return [f"vx_{name}" for name in names]


def _attention_of(
    mixer: str, options: dict[str, Any], module: Any, query: Tensor, key: Tensor, *args: Any,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend with the layer's kernel, which is created in its first call."""
    recipe = {"mixer": mixer, "options": options}
    if not TransformersAttention().matches(module):
        raise ValueError(
            f"attn_implementation vx_{mixer}: {type(module).__name__} is not one of the layers "
            f"that can be converted: {', '.join(_CLASSES.values())}"
        )
    prefix = _prefix(module.config)
    patches = query.shape[2] - prefix
    shape = _shape(module.config, patches)
    if not hasattr(module, "kernel") or module.kernel.recipe != recipe:
        heads, _, width = query.shape[1:]
        grid = TokenGrid(shape or (patches,), prefix)
        inner = KERNELS.create(mixer, Site(heads, width, width, grid, grid), options=options)
        inner.start_from_softmax()
        scale = 1.0 if scaling is None else scaling * width**0.5
        kernel = ConvertedKernel(inner, GridTracker(), scale, needs_centered_keys(inner), recipe)
        module.kernel = kernel.to(query.device, query.dtype).train(module.training)
    module.kernel.tracker.note(shape)
    return attention(module, query, key, *args, **kwargs)


def _prefix(config: Any) -> int:
    """Return the number of class and register tokens of a model."""
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    classes = {"siglip_vision_model": 0, "ijepa": 0, "deit": 2}.get(config.model_type, 1)
    return classes + registers


def _shape(config: Any, patches: int) -> tuple[int, ...]:
    """Return the grid of the patches: that of the configuration, else a square one, else ()."""
    sizes = (config.image_size, config.patch_size)
    (height, width), (down, right) = ((s, s) if isinstance(s, int) else tuple(s) for s in sizes)
    usual = height // down, width // right
    side = math.isqrt(patches)
    return usual if math.prod(usual) == patches else (side, side) if side**2 == patches else ()
