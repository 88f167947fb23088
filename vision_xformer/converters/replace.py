"""Replace the kernel in the attention layers of a model, and restore softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..grid import TokenGrid
from ..kernels import KERNELS, Kernel, Site
from ..mixers import Mixer, list_mixers
from ..mixers.attention import Attention
from ..options import check_indices, check_options, check_types, options_of
from .adapters import Adapter, Heads, OwnAttention, PlainAttention, RefusedError, TorchAttention
from .report import Report, Row, measure_layer
from .timm_attention import TimmAttention, TimmRotary
from .tokens import Call, ConvertedKernel, GridTracker, input_shape, needs_centered_keys, observe
from .transformers_attention import TransformersAttention

ADAPTERS: tuple[Adapter, ...] = (
    OwnAttention(),
    TimmAttention(),
    TimmRotary(),
    TransformersAttention(),
    TorchAttention(),
    PlainAttention(),  # last, as it matches any class with the right attributes
)
# Reasons why attention of these classes cannot be converted, by class name.
_REASONS = {
    "WindowAttention": "its windows add a position bias to the attention map",
    "SwinAttention": "its windows add a position bias to the attention map",
    "BeitAttention": "it adds a position bias to the attention map",
    "ClassAttn": "class attention has a single query",
    "ClassAttention": "class attention has a single query",
    "LayerScaleBlockClassAttn": "class attention has a single query",
    "CrossAttention": "queries and keys come from different tokens",
    "AttentionPoolLatent": "a pooling head has a query of its own",
    "SiglipMultiheadAttentionPoolingHead": "a pooling head has a query of its own",
    "TalkingHeadAttn": "it mixes the heads of the attention map",
    "SamVisionAttention": "it adds relative positions to the attention map",
    "SamVisionSdpaAttention": "it adds relative positions to the attention map",
}
# Prefix tokens of layers whose other tokens an encoder shuffles: they are a sequence, not a grid.
_SHUFFLED = {"ViTMAEAttention": 1}


Layers = Iterable[int] | Callable[[str, nn.Module], bool]


def adapter_of(layer: nn.Module) -> Adapter | None:
    """Return the adapter for a layer, converted or not, or None."""
    return next((a for a in ADAPTERS if a.matches(layer) or a.is_converted(layer)), None)


def converted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the converted layers of a model by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if (adapter := adapter_of(layer)) is not None and adapter.is_converted(layer)
    }


def convert(
    model: nn.Module,
    mixer: str,
    *,
    layers: Layers | None = None,
    image_size: int | tuple[int, int] | None = None,
    center_keys: bool | None = None,
    **options: Any,
) -> Report:
    """Replace softmax in the attention layers of a model by another kernel, in place.

    Projections, norms and gates are kept under their names; the state dict gains ``...kernel.*``.
    Supported are attention of this package, of timm (``Attention``, ``AttentionRope``,
    ``EvaAttention``) and of nine vision models of transformers, ``nn.MultiheadAttention``, and
    attention as in the code of DINOv2. Rotary position embeddings are applied to queries and keys
    before the kernel, so that positive feature maps stay positive.

    Args:
        model: a model of images (B, C, H, W).
        mixer: a kernel, one of ``KERNELS.names()``, such as "nystrom" or "linear".
        layers: which of the convertible layers to convert: indices, negative ones counted from the
            end, or a function of name and module that returns whether to convert it; by default
            all.
        image_size: height and width in pixels, for a model that does not state it.
        center_keys: subtract the mean of the keys over the tokens before the kernel. This does not
            change softmax. By default it is done for "linear", which then starts closer to softmax.
        options: of the kernel.

    Returns:
        A report with a row for each attention layer: converted, kept or refused, with its cost.

    Raises:
        ValueError: for a model without a layer that can be converted, an unknown kernel or option,
            or a kernel that does not fit. The model is then unchanged.
    """
    _check_kernel(mixer, options)
    check_types({"center_keys": center_keys}, convert)
    known = dict(attention_layers(model))
    done = set(converted_layers(model))
    candidates, rows, shape = _candidates(model, known, image_size)
    chosen = _choose(layers, {n: m for n, m in known.items() if n in candidates or n in done})
    if layers is not None and (again := sorted(done & chosen)):
        raise ValueError(f"{again[0]} is already converted: call vx.revert(model) first")
    given = None if image_size is None or _states(model, shape) else shape[1:]
    recipe = {"mixer": mixer, "options": options, "image_size": given}
    trackers: dict[str, GridTracker] = {}
    kernels: dict[str, ConvertedKernel] = {}
    for name, candidate in candidates.items():
        kind = type(candidate.layer).__name__
        if name not in chosen:
            rows[name] = Row(name, kind, "kept")
            continue
        kernels[name] = _build(recipe, candidate, trackers, center_keys)
        status, weight = _status(mixer, candidate.heads), candidate.heads.weight
        rows[name] = measure_layer(name, kind, status, kernels[name], weight)
    if any(kernel.fixed for kernel in kernels.values()):
        _check_fixed_size(model, mixer, shape)
    for conv, tracker in trackers.items():
        model.get_submodule(conv).register_forward_hook(tracker)
    for name, kernel in kernels.items():
        candidates[name].adapter.install(candidates[name].layer, kernel)
    ordered = [rows[name] for name in known]
    return Report(mixer, dict(options), ordered, next(iter(kernels.values())).site)


def _states(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model states the size of its images, and it is this one."""
    try:
        return input_shape(model, None) == shape
    except ValueError:
        return False


class _Candidate(NamedTuple):
    """A layer that can be converted."""

    layer: nn.Module
    adapter: Adapter
    heads: Heads
    call: Call


def _candidates(
    model: nn.Module, known: Mapping[str, nn.Module], image_size: int | tuple[int, ...] | None
) -> tuple[dict[str, _Candidate], dict[str, Row], tuple[int, ...]]:
    """Return the layers that can be converted, the rows of all others, and the image shape.

    Raises:
        ValueError: if no layer can be converted.
    """
    found: dict[str, tuple[Adapter, Heads]] = {}
    refused: dict[str, str] = {}
    for name, layer in known.items():
        try:
            found[name] = _describe(layer, model.get_submodule(name.rpartition(".")[0]))
        except RefusedError as error:
            refused[name] = _known_reason(layer) or str(error)
    shape = input_shape(model, image_size) if found else ()
    calls = observe(model, {name: known[name] for name in found}, shape) if found else {}
    candidates = {}
    for name, (adapter, heads) in found.items():
        if (misfit := _misfit(calls.get(name))) is None:
            call, prefix = calls[name], _SHUFFLED.get(type(known[name]).__name__)
            if prefix is not None and "decoder" not in name:
                grid = TokenGrid((call.grid.length - prefix,), prefix)
                call = call._replace(grid=grid, conv=None)
            candidates[name] = _Candidate(known[name], adapter, heads, call)
        else:
            refused[name] = misfit
    rows = {n: Row(n, type(known[n]).__name__, f"refused: {why}") for n, why in refused.items()}
    if not candidates:
        reasons = dict.fromkeys(f"{row.layer}: {row.status}" for row in rows.values())
        raise ValueError(
            f"{type(model).__name__} has no attention that can be converted"
            + (f" ({'; '.join(list(reasons)[:5])})" if reasons else "")
        )
    return candidates, rows, shape


def _describe(layer: nn.Module, parent: nn.Module) -> tuple[Adapter, Heads]:
    """Return the adapter of a layer and its heads.

    Raises:
        RefusedError: for a layer that cannot be converted.
    """
    adapter = adapter_of(layer)
    if adapter is None:
        raise RefusedError("its class is not known")
    if adapter.is_converted(layer):
        raise RefusedError("it is already converted")
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise RefusedError("nn.TransformerEncoderLayer does not call it in evaluation mode")
    if hasattr(adapter, "forward") and "forward" in vars(layer):
        raise RefusedError("its forward is set on the instance, as by hooks of accelerate")
    try:
        return adapter, adapter.heads(layer)
    except StopIteration:
        raise RefusedError("its projections have no parameters, as after quantization") from None


def _status(mixer: str, heads: Heads) -> str:
    """Return the kernel, and what of the layer it has no counterpart for."""
    if heads.dropout and "dropout" not in options_of(KERNELS[mixer]):
        return f"{mixer}, without dropout {heads.dropout:g} of attention weights"
    return mixer


def revert(model: nn.Module) -> None:
    """Restore softmax in all converted layers of a model, in place.

    Raises:
        ValueError: for a model without converted layers.
    """
    layers = converted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no converted layers")
    for layer in layers.values():
        adapter = adapter_of(layer)
        assert adapter is not None
        adapter.remove(layer)
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, GridTracker):
                del module._forward_hooks[key]


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the attention layers of a model; layers inside another one are part of it."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        known = adapter_of(module) is not None
        if known or (_is_attention(module) and not _contains_known(module)):
            inside.append(name)
            yield name, module


def _is_attention(module: nn.Module) -> bool:
    """Whether a module has parameters and the name or the parts of an attention layer.

    The class name contains "attention" or "attn", or there are heads and several projections.
    """
    name = type(module).__name__.lower()
    if "attention" in name or "attn" in name:
        return next(module.parameters(), None) is not None
    has_heads = isinstance(getattr(module, "num_heads", None), int)
    return has_heads and sum(isinstance(part, nn.Linear) for part in module.children()) > 1


def _contains_known(module: nn.Module) -> bool:
    parts = (part for part in module.modules() if part is not module)
    return any(isinstance(part, Mixer) or adapter_of(part) is not None for part in parts)


def _known_reason(layer: nn.Module) -> str | None:
    names = [c.__name__ for c in type(layer).__mro__]
    return next((_REASONS[n] for n in names if n in _REASONS), None)


def _misfit(call: Call | None) -> str | None:
    """Return the reason why a layer that is called like this cannot be converted, or None."""
    if call is None:
        return "the model does not call it"
    if call.masked is not None:
        return f"it is called with {call.masked}"
    if call.crossed:
        return "queries and keys come from different tokens"
    return None


def _check_kernel(mixer: str, options: dict[str, Any]) -> None:
    if mixer not in KERNELS and mixer in list_mixers():
        raise ValueError(
            f"mixer {mixer!r} has no queries and keys, so it cannot use those of the model; "
            f"kernels: {', '.join(KERNELS.names())}"
        )
    check_options(f"kernel {mixer!r}", options, options_of(KERNELS[mixer]))


def _choose(layers: Layers | None, known: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the layers to convert, out of those that can be or are converted.

    Raises:
        ValueError: for an index out of range, or if none is chosen.
    """
    names = list(known)
    if layers is None:
        return set(names)
    if callable(layers):
        chosen = {name for name in names if layers(name, known[name])}
    else:
        indices = check_indices("layers", layers, len(names), "layers that can be converted")
        chosen = {names[i] for i in indices}
    if not chosen:
        raise ValueError(f"layers selects none of the {len(names)} layers that can be converted")
    return chosen


def _build(
    recipe: Mapping[str, Any],
    candidate: _Candidate,
    trackers: dict[str, GridTracker],
    center_keys: bool | None,
) -> ConvertedKernel:
    """Build the kernel of one layer, on its device and in its dtype.

    Args:
        recipe: name and options of the kernel.
        candidate: the layer.
        trackers: by convolution, to which that of the layer is added.
        center_keys: see :func:`convert`.

    Raises:
        ValueError: for options that do not fit the layer.
    """
    layer, _, heads, call = candidate
    mixer, options, tracker = recipe["mixer"], recipe["options"], None
    if isinstance(layer, Attention):
        site = layer.kernel.site  # its grid is passed to it
    else:
        site = Site(*heads[:3], call.grid, call.grid)
        if call.conv is not None:
            tracker = trackers.setdefault(call.conv, GridTracker(call.grid.shape))
    if heads.dropout and "dropout" in options_of(KERNELS[mixer]):
        options = {"dropout": heads.dropout, **options}
    with torch.device(heads.weight.device):
        inner = KERNELS.create(mixer, site, options=options)
    if inner.operand_widths != Kernel(site).operand_widths:
        raise ValueError(f"{mixer} with {options} needs keys or values of other widths")
    inner.start_from_softmax()
    centered = needs_centered_keys(inner) if center_keys is None else center_keys
    scale = heads.scale * heads.key_dim**0.5
    scale = 1.0 if abs(scale - 1) < 1e-9 else scale
    kernel = ConvertedKernel(inner, tracker, scale, centered, {**recipe, "center_keys": centered})
    return kernel.to(heads.weight.dtype).train(layer.training)


def _check_fixed_size(model: nn.Module, mixer: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if the model takes images of another size."""
    wider = (*shape[:-1], 2 * shape[-1])
    try:
        observe(model, {}, wider)
    except Exception:  # libraries raise errors of any type for a wrong image size
        return
    raise ValueError(
        f"kernel {mixer!r} is tied to one number of tokens, but {type(model).__name__} accepts "
        "images of any size: choose another kernel, such as nystrom or performer"
    )
