"""Operations of a forward pass.

A multiplication with its addition is 2; those of matrix products and convolutions count, those for
each element do not (the convention of ``torch.utils.flop_counter``). Kernels and mixers may state
their own number: a counter sees no FFT, and would count what an implementation does in excess of
its equation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """Operations of ``module(*inputs)`` in evaluation mode; tensors on "meta" are enough.

    A part with a method ``flops``, which is called with what the part is called with, counts for
    what that returns.
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
    training = {part: part.training for part in module.modules()}
    try:
        with counter, torch.enable_grad():  # without, the counter fails on a bare parameter
            module.eval()(*inputs)
    finally:
        for part, mode in training.items():
            part.training = mode
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() + stated
