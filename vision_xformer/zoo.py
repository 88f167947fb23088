"""The names of models: one grammar that parses and prints them.

A name is ``[hybrid_]`` + a backbone's name whose T is replaced by the letter of the mixer +
``[_size]`` + ``[_rope]``: T full attention, L Linformer, P Performer, N Nystromformer, F Fourier,
E external attention. A backbone without a T has its own mixer, and others by ``mixer=``. Case,
``-`` and ``_`` do not matter: HybridViN-RoPE is hybrid_vin_rope. Without a size it is of the size
class of the paper (Jeevan & Sethi 2022) for CIFAR: width 128, depth 4, heads 4, MLP 256.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import mixers
from .backbones import BACKBONES, Backbone, Config
from .registry import check_options, check_types, unknown
from .weights import load_weights

LETTERS = {
    "t": "softmax", "l": "linformer", "p": "performer", "n": "nystrom", "f": "fourier",
    "e": "external",
}  # fmt: skip
_ALIASES = {"fnet": "vif", "eanet": "vie"}
_T = re.compile(r"t(?=_|$)")  # of a backbone's name: that of vit, vit_lite, simple_vit


class Name(NamedTuple):
    """A parsed name; ``str`` prints it. ``letter`` is None for a backbone without them."""

    backbone: str
    letter: str | None = None
    size: str = ""
    hybrid: bool = False
    rope: bool = False

    def __str__(self) -> str:
        family = self.backbone
        if self.letter:
            family = re.sub(_T, self.letter, family, count=1)
        parts = ["hybrid" * self.hybrid, family, self.size, "rope" * self.rope]
        return "_".join(p for p in parts if p)


def _field_names(backbone: str) -> set[str]:
    return {f.name for f in dataclasses.fields(BACKBONES[backbone].config_class)}


def has_letters(backbone: str) -> bool:
    """Whether names say its mixer by a letter: it has a T, and a slot."""
    return _T.search(backbone) is not None and "mixer" in _field_names(backbone)


def mixer_of(backbone: str, letter: str) -> str:
    """The mixer of a letter; T is the backbone's own full attention."""
    if letter != "t":
        return LETTERS[letter]
    fields = dataclasses.fields(BACKBONES[backbone].config_class)
    return next(str(field.default) for field in fields if field.name == "mixer")


def _all_names() -> list[Name]:
    """Every supported name: what a backbone has no slot for, or a mixer cannot do, is not one."""
    names = []
    for backbone in BACKBONES.names():
        fields = _field_names(backbone)
        for size in BACKBONES[backbone].presets:
            if not has_letters(backbone):
                names.append(Name(backbone, size=size))
                continue
            for letter in LETTERS:
                mixer = mixer_of(backbone, letter)
                for hybrid in (False, True) if BACKBONES[backbone].hybrid else (False,):
                    names.append(Name(backbone, letter, size, hybrid))
                    if "rope" in fields and mixers.takes_rope(mixer):
                        names.append(Name(backbone, letter, size, hybrid, True))
    return names


def _squash(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace("/", "").replace(" ", "")


def parse_name(name: str) -> Name:
    """The parts of a model's name; an unknown one is a ValueError with the nearest."""
    wanted = _squash(name)
    for alias, family in _ALIASES.items():
        # fnet2d is a backbone of its own
        if alias in wanted and "fnet2d" not in wanted:
            wanted = wanted.replace(alias, family)
    known = {_squash(str(n)): n for n in _all_names()}
    if wanted not in known:
        raise unknown("model", name.lower().replace("-", "_"), map(str, known.values()))
    return known[wanted]


def list_models(pattern: str = "*") -> list[str]:
    """Names for :func:`create_model` that match a shell-style pattern ("hybrid*"), sorted."""
    names = [str(n) for n in _all_names()]
    return sorted(fnmatch.filter(names, pattern.lower().replace("-", "_")))


def _paper_options(name: Name) -> dict[str, Any]:
    """What the paper's scripts set beside the sizes (measured from their state dicts)."""
    options: dict[str, dict[str, Any]] = {
        "p": {"qkv_bias": True},
        "l": {"share_kv": True, "one_kv_head": not (name.hybrid or name.rope)},
    }
    return options.get(name.letter or "", {})


def name_to_config(name: str, mixer: str | None = None) -> Config:
    """The configuration a name stands for, or its like with another mixer."""
    parsed = parse_name(name)
    cls = BACKBONES[parsed.backbone]
    fields, known = dict(cls.presets[parsed.size]), _field_names(parsed.backbone)
    if parsed.letter and mixer is None:
        mixer = mixer_of(parsed.backbone, parsed.letter)
    if mixer is not None and "mixer" in known:
        options = dict(fields.get("mixer_options", {}))
        if _is_paper(parsed):
            options |= _paper_options(parsed)
        fields |= _with_mixer(known, mixer, options)
    if parsed.hybrid:
        fields["stem"] = "conv"
    elif _is_paper(parsed):
        fields["position_std"] = 1.0  # as the paper's; its convolutions bring places of their own
    if parsed.rope:
        # the paper rotates by the place in the sequence; the field's sizes by row and column
        fields["rope"] = "raster" if _is_paper(parsed) else "axial"
        other = {"position": "none", "position_bias": False}
        fields |= {k: v for k, v in other.items() if k in known}
    return cls.config_class(**fields)


def _is_paper(name: Name) -> bool:
    """Whether it is one of the paper's own configurations."""
    return name.backbone == "vit" and not name.size


def _with_mixer(fields: Iterable[str], mixer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the ``fields`` that another mixer changes.

    Options stay where the mixer has them; what it cannot do is off: heads, a position bias.
    """
    known = mixers.mixer_options(mixer)
    changed: dict[str, Any] = {
        "mixer": mixer,
        "mixer_options": {k: v for k, v in options.items() if k in known},
    }
    if not mixers.takes_heads(mixer):
        changed |= {"heads": None, "key_dim": None}
    if not mixers.takes_bias(mixer):
        changed["position_bias"] = False
    return {k: v for k, v in changed.items() if k in fields}


def create_model(
    name: str | Config | Mapping[str, Any],
    *,
    image_size: int | tuple[int, ...] | None = None,
    channels: int | None = None,
    mixer: str | None = None,
    mixer_options: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Backbone:
    """Build a model by name, or from the ``config`` of another (or its ``to_dict()``).

    Args:
        name: see :func:`list_models`; case, ``-`` and ``_`` do not matter.
        image_size: pixels, one size for all axes or one each; sets ``input_shape``.
        channels: channels of the input; sets ``input_shape``.
        mixer: another token mixer, see :func:`~vision_xformer.list_mixers`. Options and heads of
            the name that it does not have are left out.
        mixer_options: added to the name's; an option the mixer does not have is refused.
            ``stem_options`` likewise.
        weights: a state dict or a file of one, under any names that
            :func:`~vision_xformer.load_weights` understands. Every tensor that fits is loaded; a
            warning says what does not. To have nothing left out, or tables resized, call
            ``load_weights`` on the model.
        overrides: any other field of the configuration, such as ``num_classes`` or
            ``input_shape=(1, 4096)`` for signals and ``(1, 28, 28, 28)`` for volumes.

    Returns:
        The model in training mode, with fresh weights but for those given.

    Raises:
        ValueError: for an unknown name, field or option (with the nearest), or values that do not
            fit together.
    """
    if isinstance(name, str):
        config = name_to_config(name, mixer)
    elif isinstance(name, Config):
        config = name
    else:
        if not isinstance(name, Mapping) or not isinstance(name.get("backbone"), str):
            raise ValueError(
                f"a model is a name, a Config or its dict with the key 'backbone', not {name!r}"
            )
        config = BACKBONES[name["backbone"]].config_class.from_dict(name)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if image_size is not None or channels is not None:
        if "input_shape" in overrides:
            raise ValueError("give either input_shape or image_size and channels, not both")
        overrides["input_shape"] = input_shape_of(config.input_shape, image_size, channels)
    what = f"model {name!r}" if isinstance(name, str) else f"backbone {config.backbone!r}"
    slot = {"mixer": mixer, "mixer_options": mixer_options}
    check_types(slot, create_model)
    overrides |= {k: v for k, v in slot.items() if v is not None}
    check_options(what, overrides, {*fields, "image_size", "channels"})
    if mixer is not None and mixer != fields["mixer"]:
        fields |= _with_mixer(fields, mixer, fields["mixer_options"])
    if mixer_options is not None:
        overrides["mixer_options"] = {**fields["mixer_options"], **mixer_options}
    same_stem = overrides.get("stem", fields.get("stem")) == fields.get("stem")
    if "stem_options" in overrides and same_stem:
        overrides["stem_options"] = {**fields["stem_options"], **overrides["stem_options"]}
    model = BACKBONES[config.backbone](type(config)(**{**fields, **overrides}))
    if weights is not None:
        report = load_weights(model, weights, strict=False)
        if report.unused or report.missing:
            warnings.warn(f"weights of {what}: {report}", stacklevel=2)
    return model


def input_shape_of(
    default: tuple[int, ...], image_size: int | tuple[int, ...] | None, channels: int | None
) -> tuple[int, ...]:
    """(C, *shape) from an image size and channels; what is None stays as in ``default``."""
    check_types({"image_size": image_size, "channels": channels}, create_model)
    size = default[1:]
    if isinstance(image_size, int):
        size = (image_size,) * len(size)
    elif image_size is not None:
        size = tuple(image_size)
    return (default[0] if channels is None else channels, *size)
