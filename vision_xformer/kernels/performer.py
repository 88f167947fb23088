"""Performer (Choromanski et al. 2020, arXiv 2009.14794): softmax attention by random features.

FAVOR+ (eq. 5 and lemma 1): exp(q.k / sqrt(K)) = E[phi(q) phi(k)] with
phi(x) = exp(w.x' - |x'|^2/2), x' = x / K^(1/4), w normal. With m features,
out = phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1): linear in N. A column of ones beside v gives
numerator and normaliser from the same product, in which common factors of phi cancel.

The (N, m) features need not exist as a whole: a few heads' at a time fit in the cache, and the
backward pass makes them again. That takes about the memory of fused softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..layout import Layout
from ..registry import check_at_least
from .base import KERNELS, Kernel, widened, without_autocast

# Features at a time: on a CPU 2 MiB in float32, a core's level-2 cache; elsewhere 256 MiB, so that
# most calls are one block and a long sequence still fits.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_ELSEWHERE = 2**26


def random_projection(features: int, key_dim: int, orthogonal: bool) -> Tensor:
    """(m, K) normal rows; ``orthogonal``: within each block of K rows (section 2.4)."""
    gaussian = torch.randn(features, key_dim, dtype=torch.float32)
    if not orthogonal:
        return gaussian
    blocks = []
    for _ in range(math.ceil(features / key_dim)):
        q, r = torch.linalg.qr(torch.randn(key_dim, key_dim, dtype=torch.float32))
        blocks.append((q * r.diagonal().sign()).mT)  # without the signs q is not uniform
    return gaussian.norm(dim=1, keepdim=True) * torch.cat(blocks)[:features]


class _FeatureMap:
    """phi, up to factors that cancel, and its derivative. x (..., L, K), w (m, K) with K^(-1/4).

    The largest exponent is taken off, and eps keeps a normaliser from vanishing:
    "exponent" takes it over the whole exponent (of a query; of all keys of a head), "package" over
    w.x alone, as performer-pytorch, "published" as package over all keys of the batch.
    The shift is a constant of the derivative, as in performer-pytorch. "relu" is the generalised
    kernel (section 2.2): relu(w.x) + eps.
    """

    def __init__(self, form: str, is_query: bool, key_dim: int) -> None:
        self.form, self.is_query = form, is_query
        self.half_scale = 0.5 * key_dim**-0.5
        # |x|^2 cancels in a query's ratio unless the shift leaves it out
        self.with_norm = form != "relu" and not (is_query and form == "exponent")

    def raw(self, x: Tensor, w: Tensor) -> Tensor:
        """Features without eps."""
        z = x @ w.mT
        if self.form == "relu":
            return z.relu_()
        norm: Tensor | float = 0.0
        if self.with_norm:
            norm = x.square().sum(-1, keepdim=True) * self.half_scale
        if self.form == "exponent":
            z, norm = z.sub_(norm), 0.0
        if self.is_query:
            shift = z.detach().amax(-1, keepdim=True)
        elif self.form == "published":
            shift = z.detach().amax()
        else:
            shift = z.detach().amax((-2, -1), keepdim=True)
        return z.sub_(shift + norm).exp_()

    def gradient(self, x: Tensor, w: Tensor, raw: Tensor, d: Tensor) -> Tensor:
        """d(loss)/dx from d = d(loss)/d(features); ``d`` is overwritten."""
        if self.form == "relu":
            return d.mul_(raw > 0) @ w
        d.mul_(raw)
        dx = d @ w
        if self.with_norm:
            dx -= x * (2 * self.half_scale * d.sum(-1, keepdim=True))
        return dx


def _maps(form: str, key_dim: int) -> tuple[_FeatureMap, _FeatureMap]:
    """Of queries and of keys."""
    return _FeatureMap(form, True, key_dim), _FeatureMap(form, False, key_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor, form: str, eps: float) -> Tensor:
    """The equations as they stand: (..., N, K), (..., M, K), (..., M, V) -> (..., N, V)."""
    phi_q, phi_k = _maps(form, q.shape[-1])
    context = (phi_k.raw(k, w) + eps).mT @ F.pad(v, (0, 1), value=1.0)
    out = (phi_q.raw(q, w) + eps) @ context
    return out[..., :-1] / out[..., -1:]


def _blocks(q: Tensor, k: Tensor, w: Tensor) -> Iterator[slice]:
    """Heads whose features are made at a time."""
    elements = _BLOCK_ELEMENTS.get(q.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    block = max(1, elements // (max(q.shape[1], k.shape[1]) * w.shape[0]))
    return (slice(i, i + block) for i in range(0, q.shape[0], block))


# Operators of their own: a compiler would undo the blocks, and keep the features
@torch.library.custom_op("vision_xformer::performer", mutates_args=())
def _blocked(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, form: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_attend` with one leading dimension A. For the backward pass also the normaliser,
    (A, N, 1), and the context, (A, m, V + 1)."""
    phi_q, phi_k = _maps(form, q.shape[-1])
    out, normaliser, context = _like_blocked(q, k, v, w, form, eps)
    with without_autocast(q):
        for at in _blocks(q, k, w):
            ones = F.pad(v[at], (0, 1), value=1.0)
            torch.matmul(phi_k.raw(k[at], w).add_(eps).mT, ones, out=context[at])
            sums = phi_q.raw(q[at], w).add_(eps) @ context[at]
            normaliser[at] = sums[..., -1:]
            torch.div(sums[..., :-1], sums[..., -1:], out=out[at])
    return out, normaliser, context


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
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, out: Tensor, normaliser: Tensor, context: Tensor,
    d_out: Tensor, form: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; features are made again."""
    phi_q, phi_k = _maps(form, q.shape[-1])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with without_autocast(q):
        for at in _blocks(q, k, w):
            d = d_out[at]
            d_sums = torch.cat((d, -(d * out[at]).sum(-1, keepdim=True)), -1).div_(normaliser[at])
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
    ctx.set_materialize_grads(False)  # nothing differentiates normaliser and context


def _gradients(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 6
    found = _blocked_backward(*ctx.saved_tensors, d_out, ctx.form, ctx.eps)
    return *found, None, None, None


_blocked.register_autograd(_gradients, setup_context=_save)


def _has_tangents(*tensors: Tensor) -> bool:
    """Of forward-mode differentiation, which passes an operator without a word."""
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


@KERNELS.register("performer")
class Performer(Kernel):
    """
    Args:
        features: number m of random features; ``None`` for int(K ln K). Costs N m.
        orthogonal: orthogonal rows of the projection: less variance at the same m.
        feature_map: "softmax" (FAVOR+) or "relu", the generalised kernel.
        stabilizer: for "softmax", what keeps exp in range. "exponent" (the default) does at any
            scale of q and k. "package" is performer-pytorch's: it leaves out |x|^2, so that at
            ordinary scales most of the mass is its epsilon and the output nears the mean of v.
            "published" is that of vision_xformer 0.2.0, whose shift is shared by the whole batch:
            for its checkpoints only.

    Features are drawn once and saved with the weights; :meth:`redraw` draws new ones. There are
    no second derivatives. Compiled by PyTorch before 2.12, which takes that for an export, it keeps
    the features for the backward pass.
    """

    projection_matrix: Tensor

    def __init__(
        self,
        heads: int,
        key_dim: int,
        layout: Layout,
        *,
        features: int | None = None,
        orthogonal: bool = True,
        feature_map: str = "softmax",
        stabilizer: str | None = None,
    ) -> None:
        super().__init__(heads, key_dim, layout)
        if features is None:
            features = max(1, int(key_dim * math.log(key_dim)))
        check_at_least("features", features, 1)
        if feature_map not in ("softmax", "relu"):
            raise ValueError(f"feature_map {feature_map!r} must be 'softmax' or 'relu'")
        if feature_map == "relu" and stabilizer is not None:
            raise ValueError(f"stabilizer {stabilizer!r} has no meaning for feature_map 'relu'")
        if stabilizer not in (None, "exponent", "package", "published"):
            raise ValueError(
                f"stabilizer {stabilizer!r} must be 'exponent', 'package' or 'published'"
            )
        self.orthogonal = orthogonal
        self.form = "relu" if feature_map == "relu" else stabilizer or "exponent"
        self.eps = 1e-3 if feature_map == "relu" else 1e-4
        matrix = random_projection(features, key_dim, orthogonal).to(torch.get_default_dtype())
        self.register_buffer("projection_matrix", matrix)

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new random features from PyTorch's global generator."""
        features, key_dim = self.projection_matrix.shape
        self.projection_matrix.copy_(random_projection(features, key_dim, self.orthogonal))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout
    ) -> Tensor:
        with without_autocast(q):
            q_, k_, v_ = widened(q, k, v)
            w = self.projection_matrix.to(q_) * self.key_dim**-0.25
            in_one_piece = torch.compiler.is_exporting() or self.form == "published"
            if in_one_piece or _has_tangents(q_, k_, v_):
                out = _attend(q_, k_, v_, w, self.form, self.eps)
            else:
                operands = (t.flatten(0, 1) for t in (q_, k_, v_))
                out, *_ = _blocked(*operands, w, self.form, self.eps)
                out = out.unflatten(0, q.shape[:2])
        return out.to(v.dtype)

    def flops(self, q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout) -> int:
        """2 m (N + M) (K + V + 1) for each head: features, and their products with the values."""
        tokens = q.shape[-2] + k.shape[-2]
        widths = q.shape[-1] + v.shape[-1] + 1
        return 2 * q.shape[0] * self.heads * self.projection_matrix.shape[0] * tokens * widths
