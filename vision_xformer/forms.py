"""The choice between forms of an equation, by device and by the derivatives that are asked for.

Fused kernels, checkpoints and custom operators support only first derivatives in reverse mode. All
other derivatives, and torch.func, are computed from the explicit equation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_planned: str | None = None


def device_type(x: Tensor) -> str:
    """The type of device that a form is chosen for: that of ``x``, or the planned one."""
    return _planned or x.device.type


def plan_for(device: str | None) -> str | None:
    """Choose forms for a type of device instead of the tensors' own; return the one before."""
    global _planned
    before, _planned = _planned, device
    return before


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func is active, or forward-mode differentiation of tensors of any shape."""
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def needs_plain(*tensors: Tensor) -> bool:
    """Whether tensors of any shape need the plain equations, of PyTorch's own operators alone.

    That is under torch.func, in forward mode, in exports and in traces.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return exporting or is_transformed(*tensors)


class _PlainSecond(torch.autograd.Function):
    """The identity of ``out``, whose gradient can be differentiated; see :func:`plain_second`."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, plain: Callable[..., Tensor], *inputs: Tensor | None
    ) -> Tensor:
        ctx.plain = plain
        ctx.save_for_backward(*inputs)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # without create_graph
            return d, *[None] * (len(ctx.needs_input_grad) - 1)
        inputs = ctx.saved_tensors
        # Aliases, so that a tensor used for two inputs has a gradient for each of them.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(ctx.plain(*aliases), wanted, d, create_graph=True))
        needs = (t is not None and t.requires_grad for t in aliases)
        return None, None, *(next(found) if need else None for need in needs)


def plain_second(out: Tensor, plain: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Make ``out`` twice differentiable, by the derivatives of an explicit formula for it.

    A backward pass uses the operator that computed ``out``; with ``create_graph=True`` it uses the
    formula instead.

    Shape: the same as ``out``

    Args:
        out: output of an operator that has only a first derivative.
        plain: the formula; ``plain(*inputs)`` equals ``out``.
        inputs: of the formula.
    """
    if not out.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return out
    return _PlainSecond.apply(out, plain, *inputs)
