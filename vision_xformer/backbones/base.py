"""What every backbone has: a frozen configuration, and the checks of what reaches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..registry import Registry, check_at_least, check_options, check_types


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


class Backbone(nn.Module):
    """A classifier: (B, C, *shape) -> (B, num_classes). ``config`` rebuilds it.

    Subclasses are registered under the name in their ``config_class`` and list sizes in
    ``presets``; the size "" is the configuration of the X-formers paper for CIFAR-10.
    """

    config_class: ClassVar[type[Config]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    config: Config
    num_features: int
    head: nn.Module

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
        self.head = make_head(self.num_features, num_classes).to(reference)

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
                "it for that and carry the weights over with load_weights(..., resize=True)"
            )


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def make_head(width: int, num_classes: int) -> nn.Module:
    """A linear classifier, small at first; the identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


BACKBONES: Registry[Backbone] = Registry("backbone")
