"""The three public packages as they are, in the same slot: reference, oracle and peer.

Each is imported when it is first built. Their known limits are theirs, and stay: nystrom-attention
pads with tokens that take part in the softmax and shares a normaliser across the batch, so that a
sample's output depends on its neighbours; linformer takes one length only.
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from ..kernels.nystrom import check_sizes
from ..layout import Layout
from ..registry import check_at_least
from .attention import head_width
from .base import MIXERS, Mixer


class _Package(Mixer):
    """A module of (B, N, D) -> (B, N, D) from elsewhere."""

    module: nn.Module

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        self.check(x, layout, rope)
        y: Tensor = self.module(x)
        return y


@MIXERS.register("performer-pytorch")
class PerformerPytorch(_Package):
    """``performer_pytorch.SelfAttention``, with those options of our ``performer`` that it has.

    Args:
        features: random features; ``None`` for int(K ln K).
        feature_map: "softmax" or "relu".
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        layout: Layout,
        *,
        features: int | None = None,
        feature_map: str = "softmax",
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, layout)
        if features is not None:
            check_at_least("features", features, 1)
        if feature_map not in ("softmax", "relu"):
            raise ValueError(f"feature_map {feature_map!r} must be 'softmax' or 'relu'")
        heads, head_dim = head_width(dim, heads, head_dim)
        if dim % heads:
            raise ValueError(f"performer-pytorch needs heads {heads} to divide dim {dim}")
        with warnings.catch_warnings():  # it compares versions with distutils at import
            warnings.simplefilter("ignore", DeprecationWarning)
            from performer_pytorch import SelfAttention
        self.module = SelfAttention(
            dim,
            heads=heads,
            dim_head=head_dim,
            nb_features=features,
            generalized_attention=feature_map == "relu",
            dropout=proj_dropout,
            qkv_bias=qkv_bias,
        )


@MIXERS.register("nystrom-attention")
class NystromAttention(_Package):
    """``nystrom_attention.NystromAttention``, with those options of our ``nystrom`` that it has.

    Args:
        landmarks: number of landmarks.
        iterations: Newton-Schulz steps.
        residual_kernel: taps of the convolution of v; 0 for none.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        layout: Layout,
        *,
        landmarks: int = 64,
        iterations: int = 6,
        residual_kernel: int = 33,
        head_dim: int | None = None,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, layout)
        heads, head_dim = head_width(dim, heads, head_dim)
        check_sizes(landmarks, iterations, residual_kernel)
        from nystrom_attention import NystromAttention

        self.module = NystromAttention(
            dim,
            dim_head=head_dim,
            heads=heads,
            num_landmarks=landmarks,
            pinv_iterations=iterations,
            residual=residual_kernel > 0,
            residual_conv_kernel=residual_kernel,
            dropout=proj_dropout,
        )


@MIXERS.register("linformer-pytorch")
class LinformerPytorch(_Package):
    """``linformer.LinformerSelfAttention``, with those options of our ``linformer`` that it has.

    Args:
        rank: keys and values that are left.
        share_kv, one_kv_head: as there.
        dropout: of attention weights.
    """

    fixed_layout = True

    def __init__(
        self,
        dim: int,
        heads: int | None,
        layout: Layout,
        *,
        rank: int = 64,
        share_kv: bool = False,
        one_kv_head: bool = False,
        head_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, layout)
        heads, head_dim = head_width(dim, heads, head_dim)
        check_at_least("rank", rank, 1)
        if dim % heads:
            raise ValueError(f"linformer-pytorch needs heads {heads} to divide dim {dim}")
        from linformer import LinformerSelfAttention

        self.module = LinformerSelfAttention(
            dim,
            layout.length,
            k=rank,
            heads=heads,
            dim_head=head_dim,
            one_kv_head=one_kv_head,
            share_kv=share_kv,
            dropout=dropout,
        )
