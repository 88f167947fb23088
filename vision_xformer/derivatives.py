"""Second and forward-mode derivatives, and torch.func, where the fastest operator has none.

Fused kernels, checkpoints and own operators have a first derivative in reverse mode only. Other
derivatives are those of the plain equation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation is applied to tensors of any shape."""
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


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
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():  # without create_graph
            return d, None, *(None for _ in inputs)
        # Aliases keep inputs apart that are one tensor, such as keys that are also the values.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(ctx.plain(*aliases), wanted, d, create_graph=True))
        needs = (t is not None and t.requires_grad for t in aliases)
        return None, None, *(next(found) if need else None for need in needs)


def plain_second(out: Tensor, plain: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Let ``out`` be differentiated twice, with the derivatives of ``plain(*inputs)``, equal to it.

    A first backward pass uses the operator that computed ``out``. One with ``create_graph=True``
    uses ``plain`` instead.

    Shape: the same as ``out``
    """
    if not out.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return out
    return _PlainSecond.apply(out, plain, *inputs)
