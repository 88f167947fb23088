"""Count the floating-point operations of a forward pass.

A multiply-add counts as 2. Matrix products and convolutions are counted; element-wise operations
are ignored (the convention of ``torch.utils.flop_counter``). Kernels and mixers may report their
own count: a counter does not see FFTs, and would include work that is not part of the equation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .modes import evaluating


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """Count the operations of ``module(*inputs)`` in evaluation mode.

    A submodule's ``flops`` method, if any, replaces its count; it gets the ``forward`` arguments.

    Args:
        module: a model, mixer or any other module.
        inputs: what it is called with; tensors on the meta device are enough.

    Returns:
        Floating-point operations.
    """
    counter = FlopCounterMode(display=False)
    stated, before = 0, 0

    def start(part: Any, args: Any, kwargs: Any) -> None:
        nonlocal before
        before = counter.get_total_flops()

    def stop(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal stated
        stated += part.flops(*args, **kwargs) - (counter.get_total_flops() - before)

    hooks = []
    for part in module.modules():
        if hasattr(part, "flops"):
            hooks.append(part.register_forward_pre_hook(start, with_kwargs=True))
            hooks.append(part.register_forward_hook(stop, with_kwargs=True))
    try:
        # without gradients the counter fails on a bare parameter
        with evaluating(module), counter, torch.enable_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() + stated
