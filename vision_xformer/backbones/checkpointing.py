"""Gradient checkpointing: recompute blocks in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..forms import is_transformed


def checkpointed(block: nn.Module, *args: Any) -> Any:
    """Call ``block(*args)``, and call it again in the backward pass instead of storing activations.

    Raises:
        ValueError: for blocks with batch norm under torch.compile, or within torch.func.
    """
    if is_transformed():
        raise ValueError(
            "torch.func does not support gradient checkpointing: call "
            "set_grad_checkpointing(False) first"
        )
    more: dict[str, Any] = {}
    if any(isinstance(module, _BatchNorm) for module in block.modules()):
        if torch.compiler.is_compiling():
            raise ValueError("gradient checkpointing of batch norms cannot be compiled")
        more["context_fn"] = lambda: (contextlib.nullcontext(), _statistics_kept(block))
    return checkpoint(block, *args, use_reentrant=False, **more)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keep running statistics unchanged during recomputation."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
