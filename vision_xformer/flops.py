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

from .kernels import Kernel
from .mixers import Mixer
from .modes import evaluating


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """Count the operations of ``module(*inputs)`` in evaluation mode.

    The ``flops`` method of a kernel or mixer, if any, replaces the count of all that is inside; it
    gets the ``forward`` arguments. Such methods of other libraries' modules are not called.

    Args:
        module: a model, mixer or any other module.
        inputs: what it is called with; tensors on the meta device are enough.

    Returns:
        Floating-point operations.
    """
    counter = FlopCounterMode(display=False)
    stated = 0  # minus what the counter sees of the same modules
    before: list[int] = []  # the count at the start of each module that is being executed

    def start(part: Any, args: Any, kwargs: Any) -> None:
        before.append(counter.get_total_flops() + stated)

    def stop(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal stated
        inside = counter.get_total_flops() + stated - before.pop()
        stated += part.flops(*args, **kwargs) - inside

    hooks = []
    for part in module.modules():
        if _states_flops(part):
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


def _states_flops(part: nn.Module) -> bool:
    """Whether a module has a ``flops`` method that takes the arguments of ``forward``."""
    ours = isinstance(part, Kernel | Mixer) or type(part).__module__.startswith(f"{__package__}.")
    return ours and hasattr(part, "flops")
