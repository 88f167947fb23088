"""The forms that modules take on a GPU, without one: for estimates of its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .forms import device_type, plan_for

# what autocast computes in float32 on CUDA ("CUDA Ops that can autocast to float32" in the
# documentation of torch.amp); on CPU, most of it keeps the dtype of its input
_FLOAT32 = frozenset((
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin",
    "binary_cross_entropy_with_logits", "cdist", "cosh", "cosine_similarity", "cross_entropy",
    "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "kl_div", "l1_loss",
    "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "mse_loss", "nll_loss", "norm",
    "normalize", "pow", "prod", "reciprocal", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss",
    "softmax", "softmin", "softplus", "sum", "tan",
))  # fmt: skip


class _AsOnCuda(TorchFunctionMode):
    """Call the operators that CUDA would, on tensors of the CPU that have no data."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        # inside a function that is called here, this mode is off
        if func is Tensor.backward:
            with self:  # for checkpointed blocks, which are recomputed
                return _backward(args[0], kwargs["gradient"])
        if func is F.multi_head_attention_forward:
            with patch.object(F, "scaled_dot_product_attention", _fused_attention):
                return func(*args, **kwargs)
        if func.__name__ in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
        return func(*args, **kwargs)


def _backward(loss: Tensor, gradient: Tensor | None) -> None:
    """Run the autograd engine, as ``Tensor.backward`` does, which a mode would be asked for."""
    gradient = torch.ones_like(loss) if gradient is None else gradient
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (gradient,), False, False, (), True, True)


_attention = F.scaled_dot_product_attention


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The memory-efficient kernel, which stores as much as the flash kernel."""
    if q.dim() != 4 or enable_gqa:
        return _attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )
    return out


def _to_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Choose the forms of a device, "cpu" or "cuda", inside the context; tensors are on the CPU."""
    before = plan_for(device)
    try:
        with _AsOnCuda() if device == "cuda" else contextlib.nullcontext():
            yield
    finally:
        plan_for(before)


_ATEN = torch.ops.aten
_FFTS = (_ATEN._fft_r2c.default, _ATEN._fft_c2c.default, _ATEN._fft_c2r.default)
# operators of ours and the functions that compute them, whose intermediate tensors are counted
BODIES: dict[Any, Callable[..., Any]] = {}


def workspace(func: Any, inputs: tuple[Any, ...]) -> int:
    """Bytes that an operator uses beside its inputs and outputs, on the device planned for.

    An FFT copies its input unless its axes are the last ones.
    """
    if func in _FFTS:
        x, axes, *_ = inputs
        return int(x.nbytes) if axes and max(axes) < x.ndim - 1 else 0
    if func not in _WORKSPACES:
        return 0
    device, size = _WORKSPACES[func]
    return size(*inputs) if device_type(inputs[0]) == device else 0


def _grouped_convolution(x: Tensor, *rest: Any) -> int:
    """Bytes that oneDNN copies operands to: blocks of channels, which it pads."""
    block = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    more = -x.shape[1] % block
    grouped = rest[-1] > 1 and more
    return 2 * x.nbytes // x.shape[1] * (x.shape[1] + more) - x.nbytes if grouped else 0


def _softmax_backward(gradient: Tensor, *_: Any) -> int:
    """Bytes of the product of gradient and output."""
    return int(gradient.nbytes)


def _attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    """Bytes in which the flash kernel sums the gradients of q, and those of the output."""
    if rest[0] is not None or q.dtype.itemsize > 2:  # not computed by this kernel
        return 0
    batch, heads, tokens, width = q.shape
    return 4 * batch * heads * round_up(tokens, 128) * (round_up(width, 32) + 1)


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple that is at least ``size``."""
    return -(-size // multiple) * multiple


_WORKSPACES = {
    _ATEN.convolution.default: ("cpu", _grouped_convolution),
    _ATEN._softmax_backward_data.default: ("cuda", _softmax_backward),
    _ATEN._scaled_dot_product_efficient_attention_backward.default: ("cuda", _attention_backward),
}
