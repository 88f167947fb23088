"""What every backbone shares: MLP, layer scale, pooling, maps with batch norm, tables of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from .layout import Layout

# by number of axes
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATION: dict[str, Any] = {"gelu": nn.GELU, "relu": nn.ReLU}
MAX_POOL: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class Mlp(nn.Sequential):
    """Linear, GELU, dropout, linear, dropout on the last axis: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(dropout)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al. 2021, CaiT): (..., D) -> same."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def channels_last(x: Tensor) -> Tensor:
    """The same (B, C, *shape) in the memory order of tokens, in which convolutions are faster."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias


def _filled(module: nn.Module, weight: Tensor, bias: Tensor, like: nn.Module) -> nn.Module:
    """The module with that weight and bias, to be trained and in training as ``like`` is."""
    learns = any(p.requires_grad for p in like.parameters())
    module.weight = nn.Parameter(weight.detach(), learns)
    module.bias = nn.Parameter(bias.detach(), learns)
    return module.train(like.training)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over samples and tokens alike: (B, N, D) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm: (B, C, *grid) -> (B, E, *ceil(grid / stride)).

    ``kernel`` is odd; half of it is padding.
    """

    def __init__(
        self,
        axes: int,
        channels: int,
        out_channels: int,
        kernel: int,
        stride: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = CONV[axes](
            channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.norm = BATCH_NORM[axes](out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self._convolve(x))
        return y

    def _convolve(self, x: Tensor) -> Tensor:
        c = self.conv
        strided = c.groups > 1 and max(c.stride) > 1
        if x.device.type != "cpu" or not (strided and x.requires_grad):
            y: Tensor = c(x)
            return y
        # In half precision the gradient of this one's input takes a CPU 15 times as long.
        with torch.autocast("cpu", enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            return functional_call(c, {"weight": c.weight.to(wide)}, x.to(wide)).to(x.dtype)

    def fused(self) -> nn.Module:
        """One convolution that does what both do in evaluation."""
        c = self.conv
        fused = type(c)(
            c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, groups=c.groups
        )
        weights = fuse_conv_bn_weights(c.weight, None, *_statistics(self.norm))
        return _filled(fused, *weights, like=self)


class LinearNorm(nn.Module):
    """Linear map without bias, then batch norm over samples and tokens: (B, N, D) -> (B, N, E).

    ``norm_weight`` is the first value of the norm's weight: 0 makes a residual branch start as
    nothing.
    """

    def __init__(self, dim: int, out_dim: int, norm_weight: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=False)
        self.norm = TokenBatchNorm(out_dim)
        nn.init.constant_(self.norm.weight, norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        return y

    def fused(self) -> nn.Module:
        """One linear map that does what both do in evaluation."""
        fused = nn.Linear(self.linear.in_features, self.linear.out_features)
        weights = fuse_linear_bn_weights(self.linear.weight, None, *_statistics(self.norm))
        return _filled(fused, *weights, like=self)


class NormLinear(nn.Module):
    """Batch norm, then a linear map: (B, D) -> (B, E)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y

    def fused(self) -> nn.Module:
        """One linear map that does what both do in evaluation."""
        mean, variance, eps, weight, bias = _statistics(self.norm)
        scale = weight * (variance + eps).rsqrt()
        fused = nn.Linear(self.linear.in_features, self.linear.out_features)
        weights = (
            self.linear.weight * scale,
            self.linear.bias + self.linear.weight @ (bias - mean * scale),
        )
        return _filled(fused, *weights, like=self)


class SequencePool(nn.Module):
    """Mean of tokens weighted by themselves (Hassani et al. 2021): (B, N, D) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.attention(x).softmax(1).mT @ x).squeeze(1)


class TokenTable(nn.Module):
    """A learned row for each token that knows its grid, so that it can be resized: -> (N, C).

    The grid part keeps its axes ``(*grid, C)``: nothing has to guess the shape of a saved table.
    """

    prefix: nn.Parameter | None

    def __init__(self, layout: Layout, dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.randn(*layout.grid, dim) * std)
        prefix = nn.Parameter(torch.randn(layout.prefix, dim) * std) if layout.prefix else None
        self.register_parameter("prefix", prefix)

    def forward(self) -> Tensor:
        rows = self.grid.flatten(0, -2)
        return rows if self.prefix is None else torch.cat((self.prefix, rows))


def resize_grid(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Interpolate (*old, C) to (*grid, C): bicubic on images, else linear along each axis."""
    old = tuple(table.shape[:-1])
    if len(grid) != len(old):
        raise ValueError(f"a table over the grid {old} cannot be resized to the grid {grid}")
    x = table.detach().to(torch.promote_types(table.dtype, torch.float32)).movedim(-1, 0)[None]
    if len(grid) == 2:
        x = F.interpolate(x, grid, mode="bicubic", antialias=True, align_corners=False)
    else:  # one axis after the other: only the two-dimensional modes know antialiasing
        for axis, size in enumerate(grid, start=2):
            lines = x.movedim(axis, -1)
            flat = lines.reshape(1, 1, -1, lines.shape[-1])
            flat = F.interpolate(flat, (flat.shape[2], size), mode="bilinear", antialias=True)
            x = flat.view(*lines.shape[:-1], size).movedim(-1, axis)
    return x[0].movedim(0, -1).to(table.dtype)
