"""Configurations of backbones: frozen dataclasses of plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Self

from ..mixers import is_fixed, takes_heads
from ..options import check_at_least, check_options, check_probability, check_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the configurations: plain values only, so that YAML and JSON hold them exactly.

    Args:
        input_shape: (C, *shape) of one sample, in pixels.
        num_classes: width of the logits; 0 for a model without a head.
        global_pool: whether the final tokens are pooled; False, with 0 classes, returns them all.
        dynamic_size: whether the model accepts samples of other sizes than ``input_shape``. Learned
            positions are then interpolated in each call.

    Raises:
        ValueError: for a value of the wrong type or out of range.
    """

    backbone: ClassVar[str]
    input_shape: tuple[int, ...] = (3, 32, 32)
    num_classes: int = 10
    global_pool: bool = True
    dynamic_size: bool = False

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
        if self.num_classes and not self.global_pool:
            raise ValueError(f"num_classes {self.num_classes} must be 0 with global_pool=False")
        values = vars(self)
        for name in ("dropout", "emb_dropout", "drop_path"):
            check_probability(name, values.get(name, 0.0))
        if not values.get("norm_eps", 1.0) > 0:  # NaN is not, either
            raise ValueError(f"norm_eps {values['norm_eps']} must be above 0")
        check_at_least("position_std", values.get("position_std", 0.0), 0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, and the name of the backbone; ``create_model`` accepts it."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        values = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"backbone": self.backbone, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: for an unknown field.
        """
        fields = {k: v for k, v in values.items() if k != "backbone"}
        check_options(
            f"backbone {cls.backbone!r}", fields, [f.name for f in dataclasses.fields(cls)]
        )
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """Configuration of models whose token mixer can be chosen.

    Args:
        mixer: token mixer by name.
        mixer_options: its options.
    """

    mixer: str = "softmax"
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tied("mixer", self.mixer)

    def check_tied(self, field: str, name: str) -> None:
        """Raise a ValueError for a mixer that is tied to its grid if ``dynamic_size`` is set."""
        if self.dynamic_size and is_fixed(name):
            raise ValueError(
                f"{field} {name!r} is tied to one number of tokens: dynamic_size must be False"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(MixerConfig):
    """Configuration of models made of :class:`Block`.

    Args:
        mlp_ratio: ratio of the hidden width of the MLPs to D.
        dropout: dropout in the MLP; that of a mixer is one of its options.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        norm_eps: epsilon of the layer norms.
    """

    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageFields:
    """Fields of a configuration that has one value for each stage.

    Args:
        dims: width D of each stage.
        depths: number of blocks of each stage.
        heads: number of heads of each stage; None for a mixer without heads.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] | None

    def check_stages(self, mixer: str, *names: str) -> None:
        """Raise a ValueError unless these fields have a value of at least 1 for each of ``dims``.

        The same holds for ``heads`` if the mixer has heads; otherwise it must be None.
        """
        if takes_heads(mixer):
            names = (*names, "heads")
        elif self.heads is not None:
            raise ValueError(f"mixer {mixer!r} has no heads: heads {self.heads} must be None")
        for name in ("dims", "depths", *names):
            values = getattr(self, name)
            if not values or len(values) != len(self.dims) or min(values) < 1:
                raise ValueError(
                    f"{name} {values} must be one number for each of dims {self.dims}, at least 1"
                )

    def heads_of(self, stage: int) -> int | None:
        """The number of heads of a stage."""
        return None if self.heads is None else self.heads[stage]
