"""The three original packages, unchanged: reference, oracle and baseline.

Each is imported when it is first built. Their known limits remain: nystrom-attention pads with
tokens that take part in the softmax and shares a normalizer across the batch, so that the output of
a sample depends on its batch; linformer supports a single sequence length.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import TokenGrid
from ..kernels import ValuePath, merge_heads, split_heads
from ..kernels.nystrom import check_sizes
from ..options import check_at_least
from .base import MIXERS, Mixer, head_width


class _Package(Mixer):
    """A module (B, N, D) -> (B, N, D) of another package.

    Attributes:
        value_layer: name of its layer to values, which come last in its output.
    """

    module: nn.Module
    value_layer: ClassVar[str] = "to_v"

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        self.check(x, grid, rope)
        return self.module(x)

    def value_path(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> ValuePath:
        """Return the mixer as a function of its values, see :class:`Mixer`.

        The output of the layer to values is replaced, and the input of the output layer recorded.

        Raises:
            ValueError: for a module whose values are its keys.
        """
        self.check(x, grid, rope)
        if not hasattr(self.module, self.value_layer):
            raise ValueError(
                f"{type(self).__name__} with share_kv=True has no attention map: it is not linear "
                "in its values, which are its keys"
            )
        source = self.module.get_submodule(self.value_layer)
        to_out = self.module.get_submodule("to_out")
        output = next(m for m in to_out.modules() if isinstance(m, nn.Linear))
        heads, projected = self.heads, source(x)
        assert heads is not None
        head_dim = output.in_features // heads
        width = projected.shape[-1] // (3 if self.value_layer == "to_qkv" else 1)

        def apply(values: Tensor) -> Tensor:
            merged, found = merge_heads(values), []

            def replace(module: nn.Module, inputs: Any, projected: Tensor) -> Tensor:
                padding = projected.shape[1] - merged.shape[1]  # nystrom-attention pads in front
                padded = F.pad(merged, (0, 0, padding, 0))
                return torch.cat((projected[..., :-width], padded), -1)

            def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
                found.append(inputs[0][:, -merged.shape[1] :])

            hooks = source.register_forward_hook(replace), output.register_forward_pre_hook(record)
            try:
                self.module(x)
            finally:
                for hook in hooks:
                    hook.remove()
            return split_heads(found[0], heads)

        values = split_heads(projected[..., -width:], width // head_dim)
        return ValuePath(values, apply, lambda y: to_out(merge_heads(y)), grid, grid)


@MIXERS.register("performer-pytorch")
class PerformerPytorch(_Package):
    """``performer_pytorch.SelfAttention``, with the options of ``performer`` that it supports.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: number of heads; it divides dim.
        grid: positions of the N tokens; any other grid works, too.
        features: random features; ``None`` for int(K ln K).
        feature_map: "softmax" or "relu".
        head_dim: width K per head; dim / heads by default.
        qkv_bias: whether the projection to queries, keys and values adds a bias.
        proj_dropout: dropout after the output projection.

    Raises:
        ValueError: for an invalid option.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None,
        grid: TokenGrid,
        *,
        features: int | None = None,
        feature_map: Literal["softmax", "relu"] = "softmax",
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, grid)
        if features is not None:
            check_at_least("features", features, 1)
        heads, head_dim = head_width(dim, heads, head_dim)
        if dim % heads:
            raise ValueError(f"performer-pytorch needs heads {heads} to divide dim {dim}")
        with warnings.catch_warnings():  # it compares versions with distutils at import
            warnings.simplefilter("ignore", DeprecationWarning)
            from performer_pytorch import SelfAttention
        device = torch.get_default_device()
        with torch.device("cpu"):  # its random features are copied to the CPU: impossible from meta
            module = SelfAttention(
                dim,
                heads=heads,
                dim_head=head_dim,
                nb_features=features,
                generalized_attention=feature_map == "relu",
                dropout=proj_dropout,
                qkv_bias=qkv_bias,
            )
        self.module = module.to(device)


@MIXERS.register("nystrom-attention")
class NystromAttention(_Package):
    """``nystrom_attention.NystromAttention``, with the options of ``nystrom`` that it supports.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: number of heads.
        grid: positions of the N tokens; any other grid works, too.
        landmarks: number of landmarks.
        iterations: number of Newton-Schulz steps.
        residual_kernel: taps of the convolution of v; 0 for none.
        head_dim: width K per head; dim / heads by default.
        proj_dropout: dropout after the output projection.

    Raises:
        ValueError: for an invalid option.
    """

    value_layer = "to_qkv"

    def __init__(
        self,
        dim: int,
        heads: int | None,
        grid: TokenGrid,
        *,
        landmarks: int = 64,
        iterations: int = 6,
        residual_kernel: int = 33,
        head_dim: int | None = None,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, grid)
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
    """``linformer.LinformerSelfAttention``, with the options of ``linformer`` that it supports.

    Shape: (B, N, D) -> (B, N, D)

    Args:
        dim: token width D.
        heads: number of heads; it divides dim.
        grid: positions of the N tokens.
        rank: number R of projected keys and values.
        share_kv: use the keys as values.
        one_kv_head: share keys and values between all heads.
        head_dim: width K per head; dim / heads by default.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: for an invalid option, or tokens on another grid.
    """

    fixed = True

    def __init__(
        self,
        dim: int,
        heads: int | None,
        grid: TokenGrid,
        *,
        rank: int = 64,
        share_kv: bool = False,
        one_kv_head: bool = False,
        head_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, grid)
        self.weight_grid = grid.shape
        heads, head_dim = head_width(dim, heads, head_dim)
        check_at_least("rank", rank, 1)
        if dim % heads:
            raise ValueError(f"linformer-pytorch needs heads {heads} to divide dim {dim}")
        from linformer import LinformerSelfAttention

        self.module = LinformerSelfAttention(
            dim,
            grid.length,
            k=rank,
            heads=heads,
            dim_head=head_dim,
            one_kv_head=one_kv_head,
            share_kv=share_kv,
            dropout=dropout,
        )
