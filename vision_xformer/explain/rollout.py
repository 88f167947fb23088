"""Attention rollout through all layers of a model.

Abnar & Zuidema 2020 (arXiv 2005.00928, eq. 1) multiply the maps of all layers, each averaged with
the identity for the residual connection. Chefer et al. 2021 (arXiv 2103.15679, eq. 5-6) weight the
maps by their gradients for a class. Only the row of the class token, or the mean over the rows of
the patches, is needed: a vector that is multiplied by the maps in turn, last layer first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backbones.crossvit import CrossViT
from ..converters.observe import LayerCall, recorded, tokens_of
from ..converters.replace import attention_layers, converted_layers
from ..grid import TokenGrid, segment_means
from ..kernels import ValuePath
from ..mixers import Mixer
from ..modes import evaluating
from ..precision import without_autocast
from .maps import (
    check_places,
    one_hot,
    reads_class_token,
    value_path,
    weighted_rows,
    with_kernels,
)

Fusion = Literal["mean", "max", "min"]
_FUSIONS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean, "max": torch.amax, "min": torch.amin,
}  # fmt: skip
_ROWS = 256  # rows of a map that are computed together if the whole map is needed


def rollout(
    model: nn.Module,
    images: Tensor,
    *,
    head_fusion: Fusion = "mean",
    target: int | Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Compute how much each position of the image contributes to what the head of a model reads.

    Without a target, it is the product of (A + I) / 2 over all layers (Abnar & Zuidema 2020). With
    the mean over heads this takes one backward pass of each layer, and no map is formed. With a
    target, it is the product of I + mean((A * dA)+), where dA is the gradient of the target's logit
    with respect to the map (Chefer et al. 2021). In that case, and with "max" or "min", all rows of
    a map are computed, 256 at a time, and not kept: memory B H 256 M. The inputs of all layers are
    kept and, with a target, the activations for a backward pass of the model.

    The rollout starts from the class token if the head reads it, or else from the mean over all
    patches. In a pyramid, a position's weight is spread evenly over those it was merged from. Rows
    that do not sum to 1, such as those of Nyströmformer with its convolution, are used unchanged.
    Maps and products are computed in at least float32, also for a model in bfloat16 or float16.

    Args:
        model: as for :func:`attention_maps`.
        images: (B, C, H, W), normalized as for the model.
        head_fusion: "mean", "max" or "min" over heads.
        target: a class, or a class for each image (B,), for gradient weighting.

    Returns:
        Heat (B, *grid) on the grid of the first layer, (B, h, w) for images.

    Raises:
        ValueError: for an unknown fusion, a class out of range, a target of a model that does not
            return logits, CrossViT, or a model with a layer that has no map between tokens or
            whose tokens have no known places in the image.
    """
    if head_fusion not in tuple(_FUSIONS):  # a list has no hash
        raise ValueError(f"head_fusion {head_fusion!r} must be 'mean', 'max' or 'min'")
    if any(isinstance(module, CrossViT) for module in model.modules()):
        raise ValueError("rollout follows a single sequence of tokens; CrossViT has two branches")
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        model, names = with_kernels(model, images)
        _check_complete(model)
        calls, gradients = _run(model, names, images, target)
        relevance, grid = None, TokenGrid(())
        with without_autocast(images):
            for name, gradient in zip(reversed(names), reversed(gradients), strict=True):
                path = value_path(model, name, calls, wide=True)
                check_places(model, name, path, images)
                tokens = _input_grid(model.get_submodule(name), path, calls[name])
                if relevance is None:
                    relevance, grid = _start(model, path, tokens), tokens
                step = _Step(path, tokens, head_fusion, gradient)
                # the output lies on the grid of the queries; class attention keeps the patches
                after = tokens if step.single else path.queries
                relevance, grid = step.back(_spread(relevance, grid, after)), tokens
    assert relevance is not None
    return relevance[:, grid.prefix :].unflatten(1, grid.shape)


class _Step:
    """One layer of a rollout.

    Args:
        path: the layer as a function of its values.
        tokens: positions of its input tokens.
        fusion: how the maps of its heads are combined.
        gradient: with respect to the output of the layer, or None.
    """

    def __init__(
        self, path: ValuePath, tokens: TokenGrid, fusion: Fusion, gradient: Tensor | None
    ) -> None:
        self.path, self.tokens, self.fusion = path, tokens, fusion
        self.single = path.queries.length < tokens.length and 0 in path.queries.shape
        self.gradient = None
        if gradient is not None:
            with torch.enable_grad():
                y = path.apply(path.values).detach().requires_grad_()
                output = path.finish(y)
                (self.gradient,) = torch.autograd.grad(output, y, gradient.to(output))

    def back(self, relevance: Tensor) -> Tensor:
        """Multiply by the layer: weights of its output tokens -> weights of its input tokens."""
        attended = relevance[:, : self.path.queries.length]
        assert self.path.keys is not None
        mixed = _spread(self._product(attended), self.path.keys, self.tokens)
        if self.path.queries != self.tokens and not self.single:
            return mixed  # a layer that downsamples has no residual connection
        half = 0.5 if self.gradient is None else 1.0
        kept = relevance.clone()
        kept[:, : attended.shape[1]] *= half
        return kept + half * mixed

    def _product(self, weights: Tensor) -> Tensor:
        """Multiply weights (B, N) by the map, fused over heads: (B, M)."""
        if self.fusion == "mean" and self.gradient is None:
            return weighted_rows(self.path, weights.unsqueeze(1)).mean(1).squeeze(1)
        total = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for start in range(0, weights.shape[1], _ROWS):
            some = range(start, min(start + _ROWS, weights.shape[1]))
            rows = weighted_rows(self.path, one_hot(some, self.path))
            if self.gradient is not None:
                rows = (rows * (self.gradient[:, :, some] @ self.path.values.mT)).relu()
            fused = _FUSIONS[self.fusion](rows, 1)
            total = total + (weights[:, some].unsqueeze(1) @ fused).squeeze(1)
        return total


def _check_complete(model: nn.Module) -> None:
    """Raise a ValueError if a layer of another library was not converted."""
    done = converted_layers(model)
    for name, layer in attention_layers(model):
        if name not in done and not isinstance(layer, Mixer):
            kind = type(layer).__name__
            raise ValueError(f"layer {name}: rollout needs the map of {kind}, which is unknown")


def _run(
    model: nn.Module, names: list[str], images: Tensor, target: int | Sequence[int] | Tensor | None
) -> tuple[dict[str, LayerCall], list[Tensor | None]]:
    """Run the model, and compute the gradients of the target's logits at the layers' outputs."""
    images = images.detach().clone()
    with torch.set_grad_enabled(target is not None), recorded(model, names) as calls:
        logits = tokens_of(model(images.requires_grad_(target is not None)))
    if target is None:
        return calls, [None] * len(names)
    if logits.ndim != 2:
        raise ValueError(
            f"target {target} needs a model that returns logits (B, classes), and "
            f"{type(model).__name__} returns {tuple(logits.shape)}: leave out target"
        )
    classes = _classes(target, len(images), logits.shape[-1]).to(logits.device)
    with torch.enable_grad():
        chosen = logits.gather(1, classes[:, None]).sum()
    return calls, list(torch.autograd.grad(chosen, [calls[name].output for name in names]))


def _classes(target: int | Sequence[int] | Tensor, images: int, count: int) -> Tensor:
    """Return the class of each image, (B,).

    Raises:
        ValueError: for what are no classes, or another number of them than of images.
    """
    given: Any = target.tolist() if hasattr(target, "tolist") else target
    several = given if isinstance(given, list | tuple | range) else [given]
    try:
        found = [operator.index(index) for index in several]
    except TypeError:
        found = [-1]
    if len(found) not in (1, images) or not all(0 <= index < count for index in found):
        raise ValueError(
            f"target {several} must be classes from 0 to {count - 1}, one or one for each of the "
            f"{images} images"
        )
    return torch.tensor(found).expand(images)


def _input_grid(layer: nn.Module, path: ValuePath, call: LayerCall) -> TokenGrid:
    """Return the positions of the tokens that a layer is called with.

    Raises:
        ValueError: for values that are not tokens.
    """
    if path.keys is None:
        raise ValueError(
            f"{type(layer).__name__} attends to a learned memory, not to tokens: it has no rollout"
        )
    if not isinstance(layer, Mixer):
        return path.queries
    grid: TokenGrid = call.args[1] if len(call.args) > 1 else call.kwargs["grid"]
    return grid


def _start(model: nn.Module, path: ValuePath, tokens: TokenGrid) -> Tensor:
    """Return the weights (B, N) with which the head reads the tokens of the last layer."""
    weights = path.values.new_zeros(len(path.values), tokens.length)
    if reads_class_token(model, path):
        weights[:, 0] = 1
    else:
        weights[:, tokens.prefix :] = 1 / (tokens.length - tokens.prefix)
    return weights


def _spread(weights: Tensor, grid: TokenGrid, finer: TokenGrid) -> Tensor:
    """Spread the weights of each position evenly over those of a finer grid.

    Prefix tokens that the other grid does not have are dropped.

    Shape: (B, N) -> (B, n)
    """
    if grid == finer:
        return weights
    prefix = weights.new_zeros(len(weights), finer.prefix)
    shared = min(grid.prefix, finer.prefix)
    prefix[:, :shared] = weights[:, :shared]
    cells = weights[:, grid.prefix :].unflatten(1, grid.shape)
    for axis, (parts, size) in enumerate(zip(grid.shape, finer.shape, strict=True), start=1):
        if parts != size:
            means = segment_means(size, parts, weights.dtype, weights.device)
            cells = (cells.movedim(axis, -1) @ means).movedim(-1, axis)
    return torch.cat((prefix, cells.flatten(1)), 1)
