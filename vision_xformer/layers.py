"""Layers that backbones and stems share: with batch norm, pooling, MLP, stochastic depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torchvision.ops import StochasticDepth

from .forms import device_type, is_transformed

# by number of axes
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Activation = Literal["gelu", "relu"]
ACTIVATION: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
MAX_POOL: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def channels_last(x: Tensor) -> Tensor:
    """The same (B, C, *shape) in channels-last memory format, in which convolutions are faster."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias


def _filled(module: nn.Module, weight: Tensor, bias: Tensor, like: nn.Module) -> nn.Module:
    """The module with that weight and bias, and the mode and ``requires_grad`` of ``like``."""
    learns = any(p.requires_grad for p in like.parameters())
    module.weight = nn.Parameter(weight.detach(), learns)
    module.bias = nn.Parameter(bias.detach(), learns)
    return module.train(like.training)


def norm_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a batch norm over samples and tokens: (B, N, D) -> (B, N, D).

    It is a plain one, which ``nn.SyncBatchNorm.convert_sync_batchnorm`` may replace.
    """
    return norm(x.flatten(0, 1)).view_as(x)


class _InFormatOf(torch.autograd.Function):
    """Return ``y`` unchanged, and its gradient in the memory format of ``x``, of equal shape."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.detach()  # a view would have other strides along axes of size 1

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x).copy_(d), None


class _GridBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with correct gradients for a batch of one sample, also under ``vmap``.

    On CPUs, PyTorch silently computes wrong gradients for a single sample with several spatial axes
    if the gradient of the output and the sample differ in memory format.

    Shape: (B, C, *grid) -> same
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: (B, C, *grid) -> same."""
        if is_transformed(x):  # with a single axis, there is only one memory format
            return super().forward(x.flatten(2)).unflatten(2, x.shape[2:])
        y = super().forward(x)
        alone = x.shape[0] == 1 and device_type(x) == "cpu" and y.requires_grad
        return _InFormatOf.apply(y, x) if alone and not torch.jit.is_tracing() else y

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class GridBatchNorm2d(_GridBatchNorm, nn.BatchNorm2d):
    """Batch norm of images. Shape: (B, C, H, W) -> same."""


class GridBatchNorm3d(_GridBatchNorm, nn.BatchNorm3d):
    """Batch norm of volumes and video. Shape: (B, C, T, H, W) -> same."""


BATCH_NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: GridBatchNorm2d, 3: GridBatchNorm3d}


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm.

    Shape: (B, C, *grid) -> (B, E, *ceil(grid / stride))

    Args:
        axes: number of axes of the grid, 1 to 3.
        channels: number of input channels C.
        out_channels: number of output channels E.
        kernel: kernel size, odd; the padding is half of it.
        stride: one for all axes or one each.
        groups: of the convolution.
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
        self.strided_depthwise = groups > 1 and max(self.conv.stride) > 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalize: (B, C, *grid) -> (B, E, *ceil(grid / stride))."""
        learns = x.requires_grad and not torch.jit.is_tracing()  # traces are checked under no_grad
        if device_type(x) != "cpu" or not (self.strided_depthwise and learns):
            return self.norm(self.conv(x))
        # On CPU, the half-precision input gradient of a strided depth-wise conv is 15x slower.
        with torch.autocast("cpu", enabled=False):
            y = self.conv(x.to(self.norm.weight.dtype)).to(x.dtype)
        return self.norm(y)

    def fused(self) -> nn.Module:
        """Fold the batch norm into the convolution (inference only)."""
        c = self.conv
        fused = type(c)(
            c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, groups=c.groups
        )
        weights = fuse_conv_bn_weights(c.weight, None, *_statistics(self.norm))
        return _filled(fused, *weights, like=self)


class LinearNorm(nn.Module):
    """Linear layer without bias, then batch norm over samples and tokens.

    Shape: (B, N, D) -> (B, N, E)

    Args:
        dim: input width D.
        out_dim: output width E.
        norm_weight: initial weight of the norm; 0 initializes a residual branch to zero.
    """

    def __init__(self, dim: int, out_dim: int, norm_weight: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=False)
        self.norm = nn.BatchNorm1d(out_dim)
        nn.init.constant_(self.norm.weight, norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Project and normalize: (B, N, D) -> (B, N, E)."""
        return norm_tokens(self.norm, self.linear(x))

    def fused(self) -> nn.Module:
        """Fold the batch norm into the linear layer (inference only)."""
        fused = nn.Linear(self.linear.in_features, self.linear.out_features)
        weights = fuse_linear_bn_weights(self.linear.weight, None, *_statistics(self.norm))
        return _filled(fused, *weights, like=self)


class NormLinear(nn.Module):
    """Batch norm, then a linear layer. Shape: (B, D) -> (B, E)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and project: (B, D) -> (B, E)."""
        return self.linear(self.norm(x))

    def fused(self) -> nn.Module:
        """Fold the batch norm into the linear layer (inference only)."""
        mean, variance, eps, weight, bias = _statistics(self.norm)
        scale = weight * (variance + eps).rsqrt()
        fused = nn.Linear(self.linear.in_features, self.linear.out_features)
        weights = (
            self.linear.weight * scale,
            self.linear.bias + self.linear.weight @ (bias - mean * scale),
        )
        return _filled(fused, *weights, like=self)


class DistilledHead(nn.Module):
    """Average two heads, one for the labels and one for those of a teacher (Touvron et al. 2020).

    With ``separate``, training returns both.

    Shape: (B, D) -> (B, num_classes), or two of these

    Args:
        labels: head for the labels.
        teacher: head for the labels of a teacher.
    """

    def __init__(self, labels: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.labels, self.teacher = labels, teacher
        self.separate: bool = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classify: (B, D) -> (B, num_classes), or two of these."""
        labels, teacher = self.labels(x), self.teacher(x)
        if self.separate and self.training:
            return labels, teacher
        return (labels + teacher) / 2


class SequencePool(nn.Module):
    """Attention-weighted mean of tokens (Hassani et al. 2021). Shape: (B, N, D) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool: (B, N, D) -> (B, D)."""
        return (self.attention(x).softmax(1).mT @ x).squeeze(1)


class Mlp(nn.Sequential):
    """Linear, GELU, dropout, linear, dropout on the last axis. Shape: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(dropout)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al. 2021, CaiT). Shape: (..., D) -> same."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels: (..., D) -> same."""
        return x * self.gamma


def make_drop_path(rate: float) -> nn.Module:
    """Stochastic depth (Huang et al. 2016): skip the branch for a sample with probability ``rate``.

    Shape: (B, ...) -> same
    """
    return StochasticDepth(rate, "row") if rate else nn.Identity()


def drop_paths(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each block of each stage: rising linearly from 0 to ``last``."""
    rates = iter(last * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def mlp_width(dim: int, ratio: float) -> int:
    """The hidden width of an MLP, at least 1."""
    return max(1, round(dim * ratio))


def init_linears(module: nn.Module) -> None:
    """Initialize linear layers: truncated normal weights (std 0.02), zero bias."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
