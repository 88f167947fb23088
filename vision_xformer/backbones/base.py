"""The contract of backbones: models, stages and blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..grid import TokenGrid
from ..mixers import Mixer
from ..options import check_types
from ..positions import FixedTable, RopeKind, RotaryPosition
from ..registry import Registry
from ..summary import summary
from .checkpointing import Checkpointed
from .config import Config
from .features import FeatureModel
from .publishing import Publishable
from .resizing import resize_in_place


class VisionModel(FeatureModel, Publishable):
    """An image classifier: (B, C, *shape) -> (B, num_classes). ``config`` rebuilds it.

    Subclasses are registered under the name in their ``config_class`` and list sizes in
    ``presets``; the size "" is the configuration of the X-formers paper for CIFAR-10.

    Args:
        config: an instance of ``config_class``.

    Attributes:
        num_features: width of the pooled features.
        pretrained_cfg: "mean" and "std" of the pixels (0 to 1) that the weights expect, and
            "label_names" of the classes, if known.
    """

    config_class: ClassVar[type[Config]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    config: Config
    num_features: int
    head: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.pretrained_cfg: dict[str, Any] = {}
        self.register_load_state_dict_post_hook(_tables_follow)

    @property
    def num_classes(self) -> int:
        """Number of classes of the head."""
        return self.config.num_classes

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features, under timm's name."""
        return self.num_features

    def drop_head(self) -> None:
        """Remove the classifier and the layers that only it uses."""
        self.reset_classifier(0)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the inputs of the blocks for the backward pass, and recompute the rest."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.grad_checkpointing = enable

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Pool the final tokens: (B, N, D) -> (B, D)."""
        return x.mean(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify tokens (B, N, D): (B, num_classes), or pooled (B, D) with ``pre_logits``."""
        if self.config.global_pool:
            x = self.pool_tokens(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch: (B, C, *shape) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the classifier head, as timm's models do."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a new one for ``num_classes``; 0 returns the pooled features.

        Args:
            num_classes: number of classes.
            global_pool: "", with 0 classes, to return the final tokens (B, N, D) without pooling;
                None to keep the pooling. Only ViT supports others.

        Raises:
            ValueError: for another ``global_pool``, or "" with classes.
        """
        if global_pool:
            name = type(self).__name__
            raise ValueError(
                f"{name} pools in one way: global_pool {global_pool!r} must be None, or '' for no "
                "pooling"
            )
        pooled = global_pool is None and (num_classes > 0 or self.config.global_pool)
        self.config = dataclasses.replace(self.config, num_classes=num_classes, global_pool=pooled)
        reference = next(self.parameters())
        self.head = self.make_head(num_classes).to(reference).train(self.training)

    def make_head(self, num_classes: int) -> nn.Module:
        """A linear classifier with small initial weights; the identity for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        init_linears(head)
        return head

    def set_input_size(
        self,
        img_size: int | tuple[int, ...] | None = None,
        patch_size: int | tuple[int, ...] | None = None,
    ) -> None:
        """Change the size of the input in place, as timm's models do.

        Tables of tokens are interpolated as by ``load_weights(..., resize=True)``, and the patch
        embedding is resampled. These become new parameters, so create the optimizer afterwards;
        all other parameters stay the same.

        Args:
            img_size: pixels, one size or one for each axis; None keeps it.
            patch_size: pixels per token, one size or one for each axis; None keeps it.

        Raises:
            ValueError: for a size that does not fit, or a model whose layers have been replaced.
                The model is left untouched.
        """
        check_types({"img_size": img_size, "patch_size": patch_size}, VisionModel.set_input_size)
        channels, *shape = self.config.input_shape
        size = tuple(shape) if img_size is None else img_size
        size = (size,) * len(shape) if isinstance(size, int) else tuple(size)
        if len(size) != len(shape):
            raise ValueError(f"img_size {img_size} must be one size, or one for each of {shape}")
        changes: dict[str, Any] = {"input_shape": (channels, *size)}
        if patch_size is not None:
            if not hasattr(self.config, "patch_size"):
                raise ValueError(f"{type(self).__name__} has no patch_size that could be changed")
            changes["patch_size"] = patch_size
        config = dataclasses.replace(self.config, **changes)
        backbone = BACKBONES[config.backbone]
        with torch.device("meta"):
            before, after = backbone(self.config), backbone(config)
        resize_in_place(self, before, after)

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every saved tensor by name."""
        return {k: (tuple(v.shape), v.dtype) for k, v in self.state_dict().items()}

    def summary(self, depth: int = 2) -> str:
        """A table of modules down to ``depth``: type, output shape of one sample, parameters."""
        sample = torch.zeros(1, *self.config.input_shape).to(next(self.parameters()))
        return summary(self, sample, depth)

    def check_channels(self, x: Tensor) -> None:
        """Raise a ValueError unless the batch has the axes and channels of ``input_shape``."""
        want = self.config.input_shape
        if x.ndim != len(want) + 1:
            sizes = ", ".join(map(str, want))
            raise ValueError(f"input of shape {tuple(x.shape)} must be (B, {sizes})")
        if x.shape[1] != want[0]:
            raise ValueError(f"input has {x.shape[1]} channels; the model was built for {want[0]}")

    def check_input(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape (C, *shape) of a sample.

        Raises:
            ValueError: unless the batch is (B, *input_shape), or (B, C, ...) with ``dynamic_size``.
        """
        self.check_channels(x)
        if self.config.dynamic_size:
            return tuple(x.shape[1:])
        want = self.config.input_shape[1:]
        if x.shape[2:] != torch.Size(want):
            got, built = ("x".join(map(str, size)) for size in (x.shape[2:], want))
            raise ValueError(
                f"input of size {got}; the model was built for {built}: build it for that; "
                "load_weights(..., resize=True) carries tables of tokens over"
            )
        return self.config.input_shape


def _tables_follow(model: nn.Module, _: Any) -> None:
    """Recompute the tables of a model whose new weights have another device or dtype.

    The first forward pass would also do so, but it may be inside torch.compile or torch.export.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    for module in model.modules():
        if isinstance(module, FixedTable):
            module(like)


def make_drop_path(rate: float) -> nn.Module:
    """Stochastic depth (Huang et al. 2016): skip the branch for a sample with probability ``rate``.

    Shape: (B, ...) -> same
    """
    return StochasticDepth(rate, "row") if rate else nn.Identity()


def drop_paths(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each block of each stage: rising linearly from 0 to ``last``."""
    rates = iter(last * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


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


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x). Shape: (B, N, D) -> (B, N, D).

    Args:
        mixer: of width D.
        mlp_ratio: ratio of the hidden width of the MLP to D; 0 disables the MLP.
        dropout: dropout in the MLP.
        drop_path: probability with which a sample skips a branch.
        layer_scale: initial value of LayerScale, or None for none.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp_ratio: float,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        dim = mixer.dim
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.mixer = mixer
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.mlp: Mlp | None = None
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(dim, norm_eps)
            self.mlp = Mlp(dim, mlp_width(dim, mlp_ratio), dropout)
            self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = make_drop_path(drop_path)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``, with angles ``rope`` (N, A)."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), grid, rope)))
        if self.mlp is None:
            return x
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


def mlp_width(dim: int, ratio: float) -> int:
    """The hidden width of an MLP, at least 1."""
    return max(1, round(dim * ratio))


def make_rope(kind: RopeKind | None, mixer: Mixer, name: str) -> RotaryPosition | None:
    """Rotary positions of a ``kind`` for the mixer of that name; None for ``kind`` None.

    Raises:
        ValueError: for a mixer that does not take them.
    """
    if kind is None:
        return None
    if mixer.rope_dim is None:
        raise ValueError(
            f"mixer {name!r} does not take rotary positions: rope must be None, not {kind!r}"
        )
    return RotaryPosition(mixer.grid, mixer.rope_dim, kind)


def check_prefix(blocks: Iterable[nn.Module], name: str, instead: str) -> None:
    """Raise a ValueError if the mixer does not update class and register tokens."""
    mixers = (part for block in blocks for part in block.modules() if isinstance(part, Mixer))
    if not all(mixer.updates_prefix for mixer in mixers):
        raise ValueError(
            f"mixer {name!r} does not update class and register tokens, so they would learn "
            f"nothing: {instead}"
        )


def init_linears(module: nn.Module) -> None:
    """Initialize linear layers: truncated normal weights (std 0.02), zero bias."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


BACKBONES: Registry[VisionModel] = Registry("backbone")
