"""What every backbone has: a frozen configuration, checks of what reaches it, blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth
from typing_extensions import Self

from ..layers import LayerScale, Mlp
from ..layout import Layout
from ..mixers import Mixer
from ..positions import RotaryPosition
from ..registry import Registry, check_at_least, check_options, check_share, check_types
from ..summary import summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the configurations: plain values only, so that YAML and JSON hold it exactly.

    Args:
        input_shape: (C, *shape) of one sample.
        num_classes: width of the logits; 0 for a model without head.
    """

    backbone: ClassVar[str]
    input_shape: tuple[int, ...] = (3, 32, 32)
    num_classes: int = 10

    def __post_init__(self) -> None:
        check_types(vars(self), type(self))
        for field in dataclasses.fields(self):  # YAML and JSON have lists only
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(value, Mapping):
                plain = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
                object.__setattr__(self, field.name, plain)
        check_at_least("num_classes", self.num_classes, 0)
        values = vars(self)
        for name in ("dropout", "emb_dropout", "drop_path"):
            check_share(name, values.get(name, 0.0))
        if not values.get("norm_eps", 1.0) > 0:  # nor is NaN
            raise ValueError(f"norm_eps {values['norm_eps']} must be above 0")
        if not values.get("position_std", 0.0) >= 0:
            raise ValueError(f"position_std {values['position_std']} must be at least 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values under field names, and the backbone's name: rebuilds the model."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        values = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"backbone": self.backbone, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; an unknown field is a ValueError."""
        fields = {k: v for k, v in values.items() if k != "backbone"}
        check_options(
            f"backbone {cls.backbone!r}", fields, [f.name for f in dataclasses.fields(cls)]
        )
        return cls(**fields)


def check_stages(config: Config, names: Iterable[str]) -> None:
    """Raise a ValueError for fields that do not have a positive number for each of ``dims``."""
    dims = vars(config)["dims"]
    for name in names:
        values = getattr(config, name)
        if not values or len(values) != len(dims) or min(values) < 1:
            raise ValueError(f"{name} {values} must be one number for each of dims {dims}, above 0")


class Backbone(nn.Module):
    """A classifier: (B, C, *shape) -> (B, num_classes). ``config`` rebuilds it.

    Subclasses are registered under the name in their ``config_class`` and list sizes in
    ``presets``; the size "" is of the size class of the X-formers paper for CIFAR-10.

    Attributes:
        hybrid: whether names may ask for the convolutional stem.
        num_features: width of the pooled features.
    """

    config_class: ClassVar[type[Config]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    hybrid: ClassVar[bool] = False
    config: Config
    num_features: int
    head: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again."""
        self.grad_checkpointing = enable

    def run(self, block: nn.Module, *args: Any) -> Tensor:
        """``block(*args)``, checkpointed where that is asked for."""
        call: Callable[..., Any] = block
        if self.grad_checkpointing and torch.is_grad_enabled():
            more: dict[str, Any] = {}
            if any(isinstance(module, _BatchNorm) for module in block.modules()):
                if torch.compiler.is_compiling():
                    raise ValueError("gradient checkpointing of batch norms cannot be compiled")
                more["context_fn"] = lambda: (contextlib.nullcontext(), _statistics_kept(block))
            call = functools.partial(checkpoint, block, use_reentrant=False, **more)
        y: Tensor = call(*args)
        return y

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh head for ``num_classes`` in place; 0 leaves the pooled features."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        reference = next(self.parameters())
        self.head = self.make_head(num_classes).to(reference).train(self.training)

    def make_head(self, num_classes: int) -> nn.Module:
        """A linear classifier, small at first; the identity for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        init_linears(head)
        return head

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every saved tensor by its name."""
        return {k: (tuple(v.shape), v.dtype) for k, v in self.state_dict().items()}

    def summary(self, depth: int = 2) -> str:
        """A table of the parts down to ``depth``: kind, output shape of one sample, parameters."""
        sample = torch.zeros(1, *self.config.input_shape).to(next(self.parameters()))
        return summary(self, sample, depth)

    def check_input(self, x: Tensor, any_size: bool = False) -> None:
        """Raise a ValueError for a batch that is not (B, *input_shape)."""
        want = self.config.input_shape
        if x.ndim != len(want) + 1:
            sizes = ", ".join(map(str, want))
            raise ValueError(f"input of shape {tuple(x.shape)} must be (B, {sizes})")
        if x.shape[1] != want[0]:
            raise ValueError(f"input has {x.shape[1]} channels; the model was built for {want[0]}")
        if not any_size and x.shape[2:] != torch.Size(want[1:]):
            raise ValueError(
                f"input of size {_by(x.shape[2:])}; the model was built for {_by(want[1:])}: build "
                "it for that; load_weights(..., resize=True) carries tables of tokens over"
            )


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms still normalise by their batch, but count it only once."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def make_drop_path(rate: float) -> nn.Module:
    """Stochastic depth (Huang et al. 2016): a sample skips the branch with probability ``rate``."""
    return StochasticDepth(rate, "row") if rate else nn.Identity()


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x): (B, N, D) -> (B, N, D).

    Args:
        mixer: of width D.
        mlp_dim: hidden width of the MLP; 0 for a block without.
        dropout: in the MLP. drop_path: probability with which a sample skips a branch.
        layer_scale: first value of LayerScale, or None for none.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp_dim: int,
        *,
        dropout: float,
        drop_path: float,
        layer_scale: float | None,
        norm_eps: float,
    ) -> None:
        super().__init__()
        dim = mixer.dim
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.mixer = mixer
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.mlp: Mlp | None = None
        if mlp_dim:
            self.norm2 = nn.LayerNorm(dim, norm_eps)
            self.mlp = Mlp(dim, mlp_dim, dropout)
            self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = make_drop_path(drop_path)

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), layout, rope)))
        if self.mlp is None:
            return x
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


def drop_paths(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block: rising linearly from 0."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


def make_rope(kind: str | None, mixer: Mixer, name: str) -> RotaryPosition | None:
    """Rotary positions of a ``kind`` for the mixer of that name; None for ``kind`` None.

    Raises:
        ValueError: for a mixer without queries and keys.
    """
    if kind is None:
        return None
    if not mixer.takes_rope:
        raise ValueError(
            f"mixer {name!r} has no queries and keys to rotate: rope must be None, not {kind!r}"
        )
    return RotaryPosition(mixer.layout, mixer.head_dim, kind)


def check_prefix(blocks: nn.Module, name: str, instead: str) -> None:
    """Raise a ValueError where class and register tokens would be passed by."""
    if not all(part.reaches_prefix for part in blocks.modules() if isinstance(part, Mixer)):
        raise ValueError(
            f"mixer {name!r} passes the tokens in front by, they would learn nothing: {instead}"
        )


def init_linears(module: nn.Module) -> None:
    """Start linear maps small: truncated normal weights of deviation 0.02, no bias."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


BACKBONES: Registry[Backbone] = Registry("backbone")
