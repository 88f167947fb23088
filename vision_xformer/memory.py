"""Bytes that a forward pass stores for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


def bytes_kept(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Count the bytes that a forward pass stores for the backward pass.

    Parameters and buffers are not counted. Each storage counts once and completely: a view stores
    all of its base.
    """
    held: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # an output that held itself would never be freed
        held.append(weakref.ref(alone))
        return alone

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward()
    # those of a branch that the output does not need are already freed
    tensors = [tensor for reference in held if (tensor := reference()) is not None]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    del output  # alive until here, so that no address is reused
    for own in (*module.parameters(), *module.buffers()):
        storages.pop(own.untyped_storage()._cdata, None)
    return sum(storages.values())
