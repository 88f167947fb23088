"""Record the inputs and outputs of attention layers, and compute the features of any model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tokens import GridTracker


class LayerCall(NamedTuple):
    """One call of a layer: its arguments and the tokens (B, N, D) that it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def tokens_of(output: Any) -> Tensor:
    """Extract the tensor from the output of a layer or model of any library.

    Args:
        output: a tensor, a tuple that starts with one, or an output of transformers.

    Returns:
        Tokens (B, N, D), or logits (B, classes).

    Raises:
        ValueError: for an output without a tensor.
    """
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = getattr(output, "logits", output)
    if isinstance(found, tuple):
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"the model must return a tensor of features, not {type(output).__name__}")
    return found


@contextlib.contextmanager
def recorded(
    model: nn.Module, names: Iterable[str], follower: nn.Module | None = None
) -> Iterator[dict[str, LayerCall]]:
    """Record the calls of some layers of a model inside the context, by name.

    Compiled models run eagerly there: code that was compiled before calls no hooks.

    Args:
        model: whose calls are recorded.
        names: of its layers.
        follower: a converted model whose layers get the recorded tokens, and so follow their grid.
    """
    calls: dict[str, LayerCall] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] = LayerCall(args, kwargs, tokens_of(output))

        return hook

    hooks = [
        model.get_submodule(n).register_forward_hook(hook_of(n), with_kwargs=True) for n in names
    ]
    if follower is not None:
        hooks += [
            model.get_submodule(name).register_forward_hook(hook)
            for name, module in follower.named_modules()
            for hook in module._forward_hooks.values()
            if isinstance(hook, GridTracker)
        ]
    # importing the compiler takes a second, and without it nothing is compiled
    compiles = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


def features(model: Any, images: Tensor) -> Tensor:
    """Compute the last features of a model: those of ``forward_features`` if it has that method.

    Args:
        model: of any library.
        images: (B, C, H, W).

    Returns:
        Tokens (B, N, D), or the output of the model.
    """
    if callable(getattr(model, "forward_features", None)):
        found = model.forward_features(images)
        if isinstance(found, Tensor):
            return found
    return tokens_of(model(images))
