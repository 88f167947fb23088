"""Attention maps of any kernel or mixer that is linear in its values.

The output of such a layer is A v. It may never form A, but its vector-Jacobian product with respect
to v is r^T A, a weighted sum of rows of A, at the cost of one backward pass. The channels of v are
independent, so one pass computes as many sums as v has channels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..backbones import VisionModel
from ..converters.observe import LayerCall, recorded
from ..converters.replace import attention_layers, convert, converted_layers
from ..converters.tokens import ConvertedKernel
from ..grid import TokenGrid
from ..kernels import Kernel, ValuePath
from ..mixers import Mixer
from ..modes import check_values, evaluating
from ..options import check_indices

Queries = Literal["cls", "mean", "all"] | Sequence[int]
_POOLING = ("global_pool", "pool_type", "cls_token")  # attributes of models of timm and open_clip
_READS_CLASS = ("cls", "token", "tok", False)  # False: global_pool in the code of MAE
_MEANS = ("CLIPForImageClassification",)  # of transformers: the mean in spite of a class token


def attention_maps(
    model: nn.Module,
    images: Tensor,
    *,
    layers: Iterable[int] | None = (-1,),
    queries: Queries | None = None,
) -> Tensor:
    """Compute attention maps: the matrices A for which a layer's output per head is A v.

    They are exact for every mixer that is linear in its values, softmax or not. Entries can be
    negative where a mixer is not an average of values, such as Nyströmformer with its convolution.
    A convolution has a head for each channel, Fourier mixing two (:class:`Fourier`), and the M
    values of external attention are its memory units. Only the requested rows are computed, at the
    cost of one backward pass of the layer per V rows, V the width of the values. The memory is that
    of the maps and of one layer's backward pass.

    Args:
        model: a model of this package, or one of timm, transformers or torchvision whose attention
            :func:`convert` supports, converted or not.
        images: (B, C, H, W), normalized as for the model.
        layers: indices of attention layers, negative ones counted from the end; None for all.
        queries: "cls" for the class token, "mean" for the mean over all patches, "all", or indices
            of tokens, including prefix tokens. By default "cls" if the head of the model reads the
            class token, or else "mean".

    Returns:
        Maps (B, layers, H, queries, M).

    Raises:
        ValueError: for a layer or query out of range, "cls" without a class token, a mixer that is
            not linear in values, a model without attention, images of another shape, layers whose
            maps differ in shape, or the mean over tokens of which class tokens cannot be told.
    """
    names, found, _ = _computed(model, images, layers, queries)
    if len({maps.shape for maps in found}) > 1:
        shapes = ", ".join(f"{n} {tuple(m.shape)}" for n, m in zip(names, found, strict=True))
        raise ValueError(
            f"layers have maps of different shapes, so request them one at a time: {shapes}"
        )
    return torch.stack(found, 1)


def attention_heat(
    model: nn.Module, images: Tensor, *, layer: int = -1, queries: Queries | None = None
) -> Tensor:
    """Compute the attention maps of one layer, laid out on the grid of the keys.

    Args:
        model: as for :func:`attention_maps`.
        images: (B, C, H, W), normalized as for the model.
        layer: index of the attention layer, negative ones counted from the end.
        queries: as for :func:`attention_maps`.

    Returns:
        Maps (B, H, queries, *grid) without prefix tokens, (B, H, queries, h, w) for images.

    Raises:
        ValueError: as for :func:`attention_maps`, or for a layer that attends to a learned memory
            or to tokens whose places in the image are unknown.
    """
    (name,), (maps,), (grid,) = _computed(model, images, [layer], queries, on_grid=True)
    if grid is None:
        raise ValueError(f"layer {name} attends to a learned memory, which has no grid")
    return maps[..., grid.prefix :].unflatten(-1, grid.shape)


def _computed(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[int] | None,
    queries: Queries | None,
    on_grid: bool = False,
) -> tuple[list[str], list[Tensor], list[TokenGrid | None]]:
    """Return the names of the layers, their maps (B, H, queries, M) and the grids of their keys."""
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        model, names = with_kernels(model, images)
        chosen = names
        if layers is not None:
            indices = check_indices("layers", layers, len(names), "attention layers")
            chosen = [names[i] for i in indices]
        with recorded(model, chosen) as calls:
            model(images.clone())  # a normal tensor, even if the caller is in inference mode
        maps, grids = [], []
        for name in chosen:
            path = value_path(model, name, calls)
            averages = queries is None or (isinstance(queries, str) and queries == "mean")
            if on_grid or (averages and path.queries.prefix == 0):
                check_places(model, name, path, images)
            maps.append(weighted_rows(path, query_weights(model, path, queries)))
            grids.append(path.keys)
    return chosen, maps, grids


def with_kernels(model: nn.Module, images: Tensor) -> tuple[nn.Module, list[str]]:
    """Return a model whose attention layers are ours, and their names.

    Softmax attention of another library is replaced by ours in a copy that shares all weights.

    Raises:
        ValueError: for a model without attention layers, one on the meta device, or images of
            another library's model that are not (B, C, H, W).
    """
    check_values(model, type(model).__name__)
    if not isinstance(model, VisionModel):  # whose attention layers are all ours
        done = converted_layers(model)
        others = [n for n, layer in attention_layers(model) if not isinstance(layer, Mixer)]
        if others and images.ndim != 4:
            raise ValueError(f"images of shape {tuple(images.shape)} must be (B, C, H, W)")
        if not done.keys() >= set(others):
            shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, shared)
            try:
                height, width = images.shape[2:]
                convert(model, "softmax", image_size=(height, width))
            except ValueError:
                if not done:
                    raise
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if isinstance(module, Mixer | Kernel) and not inside:
            names.append(name)
    if not names:
        raise ValueError(f"{type(model).__name__} has no attention layers")
    return model, names


def check_places(model: nn.Module, name: str, path: ValuePath, images: Tensor) -> None:
    """Raise a ValueError for a layer whose tokens have no known places in the image."""
    if len(path.values) != len(images):
        raise ValueError(
            f"layer {name} attends in {len(path.values)} sequences for {len(images)} image(s), "
            "whose places in the image are unknown: only attention_maps with queries='all' or "
            "indices works"
        )
    kernel = model.get_submodule(name)
    if isinstance(kernel, ConvertedKernel) and kernel.tracker is None:
        raise ValueError(
            f"layer {name}: the grid of its tokens is unknown, because no Conv2d makes the patches "
            "or the model shuffles them: only attention_maps with queries='all' or indices works"
        )


def value_path(
    model: nn.Module, name: str, calls: Mapping[str, LayerCall], *, wide: bool = False
) -> ValuePath:
    """Return the layer of that name as a function of its values, as it was called.

    Args:
        model: the model.
        name: of its layer.
        calls: of its layers.
        wide: whether the function computes in at least float32.

    Raises:
        ValueError: if it is not linear in values, or was not called.
    """
    if name not in calls:
        raise ValueError(f"{type(model).__name__} does not call its layer {name}")
    layer: Any = model.get_submodule(name)
    call = calls[name]
    if wide:
        layer, call = _widened(layer, call)
    try:
        path: ValuePath = layer.value_path(*call.args, **call.kwargs)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None
    return path


def _widened(layer: nn.Module, call: LayerCall) -> tuple[nn.Module, LayerCall]:
    """Cast a layer, or a copy of it, and its call to at least float32."""
    types = [p.dtype for p in layer.parameters() if p.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, [*types, call.output.dtype], torch.float32)
    if any(other != dtype for other in types):
        layer = copy.deepcopy(layer).to(dtype)

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return layer, LayerCall(*tree_map(cast, tuple(call)))


def weighted_rows(path: ValuePath, weights: Tensor) -> Tensor:
    """Compute weighted sums of rows of the maps of all heads, without the maps.

    Shape: weights (B or 1, Q, N) -> (B, H, Q, M)
    """
    batch, groups, length, width = path.values.shape
    with torch.enable_grad():
        values = path.values.detach().requires_grad_()
        y = path.apply(values)
    weights = weights.to(y).expand(batch, -1, -1)
    heads, sums = y.shape[1], weights.shape[1]
    rows = y.new_empty(batch, heads, sums, length)
    shared = heads // groups  # heads that share values need one pass each
    for start in range(0, sums, width):
        part = weights[:, start : start + width]
        for head in range(shared):
            d = torch.zeros_like(y)
            d[:, head::shared, :, : part.shape[1]] = part.mT.unsqueeze(1)
            (found,) = torch.autograd.grad(y, values, d, retain_graph=True)
            rows[:, head::shared, start : start + width] = found[..., : part.shape[1]].mT
    return rows


def query_weights(model: nn.Module, path: ValuePath, queries: Queries | None) -> Tensor:
    """Return the weights (1, Q, N) of the requested rows.

    Raises:
        ValueError: for an unknown word, a missing class token, or an index out of range.
    """
    grid = path.queries
    if queries is None:
        queries = "cls" if reads_class_token(model, path) else "mean"
    if isinstance(queries, str):
        if queries not in ("cls", "mean", "all"):
            raise ValueError(f"queries {queries!r} must be 'cls', 'mean', 'all' or indices")
        if queries == "cls" and not _has_class_token(model, path):
            raise ValueError(f"queries 'cls': {type(model).__name__} has no class token here")
        if queries == "mean" and grid.length == grid.prefix:
            raise ValueError("queries 'mean': the class token is the only query of this layer")
        if queries == "mean":
            weights = path.values.new_zeros(1, 1, grid.length)
            weights[..., grid.prefix :] = 1 / (grid.length - grid.prefix)
            return weights
        indices: Sequence[int] = [0] if queries == "cls" else range(grid.length)
    else:
        indices = check_indices("queries", queries, grid.length, "queries")
    return one_hot(indices, path)


def one_hot(indices: Sequence[int], path: ValuePath) -> Tensor:
    """Return the weights (1, Q, N) of single queries."""
    weights = path.values.new_zeros(1, len(indices), path.queries.length)
    weights[0, range(len(indices)), list(indices)] = 1
    return weights


def _has_class_token(model: nn.Module, path: ValuePath) -> bool:
    """Whether the first query is a class token; models without one may have registers."""
    return path.queries.prefix > 0 and getattr(_pooling(model), "cls_token", 0) is not None


def reads_class_token(model: nn.Module, path: ValuePath) -> bool:
    """Whether the head of the model reads a class token, the first query of the layer."""
    if any(base.__name__ in _MEANS for m in model.modules() for base in type(m).__mro__):
        return False
    inner = _pooling(model)
    config = getattr(inner, "config", None)
    places = ((config, "pool"), (inner, "global_pool"), (inner, "pool_type"))
    pool = next((getattr(place, n) for place, n in places if hasattr(place, n)), "cls")
    return _has_class_token(model, path) and pool in _READS_CLASS


def _pooling(model: nn.Module) -> nn.Module:
    """Return the module, of those in wrappers, whose attributes say which tokens the head reads."""
    for module in model.modules():
        known = isinstance(module, VisionModel) or any(hasattr(module, name) for name in _POOLING)
        # a CNN before the attention layers has a head of its own
        if known and any(isinstance(part, Mixer | Kernel) for part in module.modules()):
            return module
    return model
