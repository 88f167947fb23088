"""Performer (Choromanski et al. 2020, arXiv 2009.14794): softmax attention by random features.

FAVOR+ (eq. 5 and lemma 1): exp(q.k / sqrt(K)) = E[phi(q) phi(k)] with
phi(x) = exp(w.x' - |x'|^2/2), x' = x / K^(1/4), w normal. With m features,
out = phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1): linear in N. Common factors of phi cancel.

The (N, m) features need not be materialized: heads are processed in cache-sized blocks, and their
features are recomputed in the backward pass, so memory matches fused softmax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forms import device_type, needs_plain, plain_second
from ..grid import TokenGrid
from ..options import check_at_least
from ..planning import BODIES
from ..precision import to_accumulate, without_autocast
from .base import KERNELS, Kernel, Site

# Features of one block: on a CPU 2 MiB in float32, the level-2 cache of a core; on other devices
# 256 MiB, so that most calls are one block and a long sequence still fits.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_DEFAULT = 2**26
_STORED = 2**23  # features that compiled code stores: 32 MiB in float32


def random_projection(features: int, key_dim: int, orthogonal: bool) -> Tensor:
    """Draw m normal rows of width K: (m, K).

    With ``orthogonal``, the rows within each block of K are orthogonal (section 2.4).
    """
    gaussian = torch.randn(features, key_dim, dtype=torch.float32)
    if not orthogonal:
        return gaussian
    blocks = []
    for _ in range(math.ceil(features / key_dim)):
        q, r = torch.linalg.qr(torch.randn(key_dim, key_dim, dtype=torch.float32))
        blocks.append((q * r.diagonal().sign()).mT)  # without the signs, q is not uniform
    return gaussian.norm(dim=1, keepdim=True) * torch.cat(blocks)[:features]


class _SoftmaxFeatures:
    """phi, up to factors that cancel, and its derivative, as in performer-pytorch.

    The maximum of w.x is subtracted from the exponent: per query, or over all keys of a head. The
    derivative treats it as a constant. An eps added later keeps the normalizer from vanishing.
    x is (..., L, K); w is (m, K) and contains the factor K^(-1/4).
    """

    with_norm = True  # |x|^2 is part of the exponent

    def __init__(self, is_query: bool, key_dim: int) -> None:
        self.is_query, self.half_scale = is_query, 0.5 * key_dim**-0.5

    def shift(self, z: Tensor) -> Tensor:
        return z.detach().amax(-1 if self.is_query else (-2, -1), keepdim=True)

    def half_norm(self, x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True) * self.half_scale

    def raw(self, x: Tensor, w: Tensor) -> Tensor:
        """Features without eps, (..., L, m)."""
        z = x @ w.mT
        return z.sub_(self.shift(z) + self.half_norm(x)).exp_()

    def gradient(self, x: Tensor, w: Tensor, raw: Tensor, d: Tensor) -> Tensor:
        """d(loss)/dx from d = d(loss)/d(features); ``d`` is overwritten."""
        d.mul_(raw)
        dx = d @ w
        if self.with_norm:
            dx -= x * (2 * self.half_scale * d.sum(-1, keepdim=True))
        return dx


class _StableFeatures(_SoftmaxFeatures):
    """The maximum of the whole exponent is subtracted; |x|^2 of a query cancels in its ratio."""

    def __init__(self, is_query: bool, key_dim: int) -> None:
        super().__init__(is_query, key_dim)
        self.with_norm = not is_query

    def raw(self, x: Tensor, w: Tensor) -> Tensor:
        z = x @ w.mT
        if self.with_norm:
            z.sub_(self.half_norm(x))
        return z.sub_(self.shift(z)).exp_()


class _BatchFeatures(_SoftmaxFeatures):
    """The maximum over the keys of the whole batch is subtracted, as in vision_xformer 0.2.0."""

    def shift(self, z: Tensor) -> Tensor:
        return super().shift(z) if self.is_query else z.detach().amax()


class _ReluFeatures(_SoftmaxFeatures):
    """The generalized kernel (section 2.2): relu(w.x)."""

    def raw(self, x: Tensor, w: Tensor) -> Tensor:
        return (x @ w.mT).relu_()

    def gradient(self, x: Tensor, w: Tensor, raw: Tensor, d: Tensor) -> Tensor:
        return d.mul_(raw > 0) @ w


_FORMS: dict[str, type[_SoftmaxFeatures]] = {
    "exponent": _StableFeatures,
    "package": _SoftmaxFeatures,
    "v0.2": _BatchFeatures,
    "relu": _ReluFeatures,
}


def _maps(form: str, key_dim: int) -> tuple[_SoftmaxFeatures, _SoftmaxFeatures]:
    """The feature maps of queries and of keys."""
    return _FORMS[form](True, key_dim), _FORMS[form](False, key_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor, form: str, eps: float) -> Tensor:
    """The plain equations: (..., N, K), (..., M, K), (..., M, V) -> (..., N, V)."""
    phi_q, phi_k = _maps(form, q.shape[-1])
    f_q, f_k = phi_q.raw(q, w) + eps, phi_k.raw(k, w) + eps
    # Compiled, a sum of its own is faster than a column of ones at few tokens.
    normalizer = (f_q * f_k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    return f_q @ (f_k.mT @ v) / normalizer


def _blocks(q: Tensor, k: Tensor, w: Tensor) -> Iterator[slice]:
    """Slices of heads processed together."""
    elements = _BLOCK_ELEMENTS.get(device_type(q), _BLOCK_ELEMENTS_DEFAULT)
    block = max(1, elements // (max(q.shape[1], k.shape[1]) * w.shape[0]))
    return (slice(i, i + block) for i in range(0, q.shape[0], block))


# Custom operators, because a compiler would undo the blocks and store the features
@torch.library.custom_op("vision_xformer::performer", mutates_args=())
def _blocked(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, form: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`_attend` with one leading dimension A.

    A column of ones next to v gives numerator and normalizer from the same product. The normalizer
    (A, N, 1) and the context (A, m, V + 1) are returned for the backward pass.
    """
    phi_q, phi_k = _maps(form, q.shape[-1])
    out, normalizer, context = _like_blocked(q, k, v, w, form, eps)
    with without_autocast(q):
        for at in _blocks(q, k, w):
            ones = F.pad(v[at], (0, 1), value=1.0)
            torch.matmul(phi_k.raw(k[at], w).add_(eps).mT, ones, out=context[at])
            sums = phi_q.raw(q[at], w).add_(eps) @ context[at]
            normalizer[at] = sums[..., -1:]
            torch.div(sums[..., :-1], sums[..., -1:], out=out[at])
    return out, normalizer, context


@_blocked.register_fake
def _like_blocked(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, form: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        v.new_empty(*q.shape[:2], v.shape[-1]),
        v.new_empty(*q.shape[:2], 1),
        v.new_empty(v.shape[0], w.shape[0], v.shape[-1] + 1),
    )


@torch.library.custom_op("vision_xformer::performer_backward", mutates_args=())
def _blocked_backward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, out: Tensor, normalizer: Tensor, context: Tensor,
    d_out: Tensor, form: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; the features are recomputed."""
    phi_q, phi_k = _maps(form, q.shape[-1])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with without_autocast(q):
        for at in _blocks(q, k, w):
            d = d_out[at]
            d_sums = torch.cat((d, -(d * out[at]).sum(-1, keepdim=True)), -1).div_(normalizer[at])
            raw = phi_q.raw(q[at], w)
            d_context = raw.mT @ d_sums + eps * d_sums.sum(-2, keepdim=True)
            dq[at] = phi_q.gradient(q[at], w, raw, d_sums @ context[at].mT)
            raw = phi_k.raw(k[at], w)
            d_values = d_context[..., :-1]
            dv[at] = raw @ d_values + eps * d_values.sum(-2, keepdim=True)
            ones = F.pad(v[at], (0, 1), value=1.0)
            dk[at] = phi_k.gradient(k[at], w, raw, ones @ d_context.mT)
    return dq, dk, dv


@_blocked_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.form, ctx.eps = inputs
    ctx.save_for_backward(*operands, *output)
    ctx.set_materialize_grads(False)  # nothing differentiates normalizer and context


def _gradients(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 6
    found = _blocked_backward(*ctx.saved_tensors, d_out, ctx.form, ctx.eps)
    return *found, None, None, None


_blocked.register_autograd(_gradients, setup_context=_save)
BODIES[torch.ops.vision_xformer.performer.default] = _blocked._init_fn
BODIES[torch.ops.vision_xformer.performer_backward.default] = _blocked_backward._init_fn


@KERNELS.register("performer")
class Performer(Kernel):
    """Softmax attention approximated by positive random features (FAVOR+). It works on any grid.

    Features are drawn once and saved with the weights; :func:`~vision_xformer.redraw_features`
    draws new ones. Under torch.func, and under torch.compile before PyTorch 2.12, which treats
    compiling as an export, the features are always stored for the backward pass.

    Shape: (B, H, N, K), (B, H, M, K), (B, H, M, V) -> (B, H, N, V)

    Args:
        site: heads, widths and grids of the kernel.
        features: number m of random features; ``None`` for int(K ln K). The cost is N m.
        orthogonal: use orthogonal rows of the projection, for less variance at the same m.
        feature_map: "softmax" (FAVOR+) or "relu", the generalized kernel.
        stabilizer: for "softmax", what keeps exp in range. "exponent" (the default) works at any
            scale of q and k. "package" is that of performer-pytorch: it leaves out |x|^2, so at
            typical scales its epsilon dominates and the output collapses to roughly the mean of v.
            "v0.2" is that of vision_xformer 0.2.0, whose shift is shared by the whole batch; it
            exists for checkpoints of that version only.
        recompute: True to recompute the features in the backward pass, for the memory of fused
            softmax; False to store them, up to 4 m numbers per token and head. "auto" (the
            default) recomputes them, except in compiled code for at most 32 MiB of features in
            float32, where a compiler that sees the equations is faster.

    Raises:
        ValueError: for an invalid option, a stabilizer with ``feature_map="relu"``, or
            ``recompute=True`` with ``stabilizer="v0.2"``, whose features are always stored.
    """

    projection_matrix: Tensor

    def __init__(
        self,
        site: Site,
        *,
        features: int | None = None,
        orthogonal: bool = True,
        feature_map: Literal["softmax", "relu"] = "softmax",
        stabilizer: Literal["exponent", "package", "v0.2"] | None = None,
        recompute: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(site)
        key_dim = site.key_dim
        if features is None:
            features = max(1, int(key_dim * math.log(key_dim)))
        check_at_least("features", features, 1)
        if feature_map == "relu" and stabilizer is not None:
            raise ValueError(f"stabilizer {stabilizer!r} has no meaning for feature_map 'relu'")
        if recompute is True and stabilizer == "v0.2":
            raise ValueError("recompute True cannot be used with stabilizer 'v0.2': use 'auto'")
        self.orthogonal, self.recompute = orthogonal, recompute
        self.form: str = "relu" if feature_map == "relu" else stabilizer or "exponent"
        self.eps = 1e-3 if feature_map == "relu" else 1e-4
        matrix = random_projection(features, key_dim, orthogonal).to(torch.get_default_dtype())
        self.register_buffer("projection_matrix", matrix)

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new random features from PyTorch's global generator."""
        features, key_dim = self.projection_matrix.shape
        self.projection_matrix.copy_(random_projection(features, key_dim, self.orthogonal))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend: q (B, H, N, K), k (B, G, M, K), v (B, G, M, V) -> (B, H, N, V)."""
        with without_autocast(q):
            q_, k_, v_ = to_accumulate(q, *(t.expand(-1, q.shape[1], -1, -1) for t in (k, v)))
            w = self.projection_matrix.to(q_) * self.site.key_dim**-0.25
            plain = functools.partial(_attend, w=w, form=self.form, eps=self.eps)
            if self.form == "v0.2" or needs_plain(q_, k_, v_) or not self._recomputes(q, k):
                out = plain(q_, k_, v_)
            else:
                operands = [t.flatten(0, 1) for t in (q_, k_, v_)]
                out, *_ = _blocked(*operands, w, self.form, self.eps)
                out = plain_second(out, plain, *operands).unflatten(0, q.shape[:2])
        return out.to(v.dtype)

    def _recomputes(self, q: Tensor, k: Tensor) -> bool:
        if self.recompute == "auto":
            tokens = q.shape[0] * q.shape[1] * (q.shape[2] + k.shape[2])
            small = tokens * self.projection_matrix.shape[0] <= _STORED
            return not (small and torch.compiler.is_compiling())
        return self.recompute

    def flops(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> int:
        """Count 2 m (N + M) (K + V + 1) for each head: features, and their products with v."""
        tokens = q.shape[-2] + k.shape[-2]
        widths = q.shape[-1] + v.shape[-1] + 1
        return 2 * q.shape[0] * self.site.heads * self.projection_matrix.shape[0] * tokens * widths

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"features={self.projection_matrix.shape[0]}, form={self.form}"


def redraw_features(model: nn.Module) -> None:
    """Draw new random features, from PyTorch's global generator, for each Performer in a module.

    Args:
        model: a model or mixer; one without random features is left unchanged.
    """
    for module in model.modules():
        if isinstance(module, Performer):
            module.redraw()
