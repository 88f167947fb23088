"""The grammar of model names: parsed, printed, and turned into configurations.

A name is ``[hybrid_]`` + the name of a backbone whose T is replaced by the letter of the mixer +
``[_size]`` + ``[_rope]``: T full attention, L Linformer, P Performer, N Nyströmformer, F Fourier,
E external attention. For a backbone without a T, choose the mixer with ``mixer=``. Names ignore
case, ``-`` and ``_``: HybridViN-RoPE is hybrid_vin_rope. A name without a size is the CIFAR
configuration of the X-formers paper (Jeevan & Sethi 2022): width 128, depth 4, heads 4, MLP 256.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from . import mixers
from .backbones import BACKBONES, Config
from .options import unknown_name_error

LETTERS = {
    "t": "softmax", "l": "linformer", "p": "performer", "n": "nystrom", "f": "fourier",
    "e": "external",
}  # fmt: skip
HYBRID = ("vit",)  # backbones whose names may ask for the convolutional stem, as in the paper
_ALIASES = {"fnet": "vif", "eanet": "vie"}
_T = re.compile(r"t(?=_|$)")  # in the name of a backbone: vit, vit_lite, simple_vit


class Name(NamedTuple):
    """A parsed name; ``str`` prints it. ``letter`` is None for a backbone without one.

    Args:
        backbone: name of the backbone.
        letter: letter of the mixer, a key of LETTERS.
        size: one of the backbone's sizes.
        hybrid: whether the stem is convolutional.
        rope: whether positions are rotary.
    """

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
    """Whether names give the mixer of that backbone by a letter."""
    return _T.search(backbone) is not None and "mixer" in _field_names(backbone)


def mixer_of(backbone: str, letter: str) -> str:
    """The mixer of a letter; T is the full attention of the backbone."""
    if letter != "t":
        return LETTERS[letter]
    fields = dataclasses.fields(BACKBONES[backbone].config_class)
    return next(str(field.default) for field in fields if field.name == "mixer")


def _exists(name: Name) -> bool:
    """Whether the backbone has that stem, and the mixer those positions."""
    if name.letter is None:
        return not (name.hybrid or name.rope)
    if name.hybrid and name.backbone not in HYBRID:
        return False
    mixer = mixer_of(name.backbone, name.letter)
    return not name.rope or ("rope" in _field_names(name.backbone) and mixers.takes_rope(mixer))


def _all_names() -> list[Name]:
    both = (False, True)
    return [
        name
        for backbone in BACKBONES.names()
        for letter in (LETTERS if has_letters(backbone) else (None,))
        for size in BACKBONES[backbone].presets
        for hybrid in both
        for rope in both
        if _exists(name := Name(backbone, letter, size, hybrid, rope))
    ]


def _squash(name: str) -> str:
    return re.sub(r"[-_/ ]", "", name.lower())


def parse_name(name: str) -> Name:
    """Split the name of a model into its parts.

    Raises:
        ValueError: for an unknown name; it suggests the nearest.
    """
    wanted = _squash(name)
    for alias, family in _ALIASES.items():
        if not wanted.startswith("fnet2d"):  # a backbone of its own
            wanted = wanted.replace(alias, family)
    for backbone in BACKBONES.names():
        letters = has_letters(backbone)
        family = (
            _T.sub(f"([{''.join(LETTERS)}])", backbone, count=1) if letters else backbone + "()"
        )
        sizes = {_squash(size): size for size in BACKBONES[backbone].presets}
        pattern = f"(hybrid)?{family.replace('_', '')}({'|'.join(sizes)})(rope)?"
        if found := re.fullmatch(pattern, wanted):
            hybrid, letter, size, rope = found.groups()
            parsed = Name(backbone, letter or None, sizes[size], bool(hybrid), bool(rope))
            if _exists(parsed):
                return parsed
    raise unknown_name_error("model", name.lower().replace("-", "_"), map(str, _all_names()))


def list_models(pattern: str = "*") -> list[str]:
    """Names for :func:`create_model` that match a shell-style pattern ("hybrid*"), sorted."""
    names = [str(n) for n in _all_names()]
    return sorted(fnmatch.filter(names, pattern.lower().replace("-", "_")))


def name_to_config(name: str, mixer: str | None = None) -> Config:
    """The configuration that a name stands for, or the same with another mixer.

    Raises:
        ValueError: for an unknown name or mixer.
    """
    parsed = parse_name(name)
    cls = BACKBONES[parsed.backbone]
    fields, known = dict(cls.presets[parsed.size]), _field_names(parsed.backbone)
    is_paper = parsed.backbone == "vit" and not parsed.size
    if parsed.letter and mixer is None:
        mixer = mixer_of(parsed.backbone, parsed.letter)
    if mixer is not None and "mixer" in known:
        options = dict(fields.get("mixer_options", {}))
        if is_paper:
            options |= _paper_options(parsed)
        fields |= with_mixer(known, mixer, options)
    if parsed.hybrid:
        fields["stem"] = "conv"
    elif is_paper:
        fields["position_std"] = 1.0  # as in the paper; its convolutional stem encodes position
    if parsed.rope:
        # The paper rotates by the position in the sequence; other models by row and column.
        fields["rope"] = "raster" if is_paper else "axial"
        other = {"position": "none", "position_bias": False}
        fields |= {k: v for k, v in other.items() if k in known}
    return cls.config_class(**fields)


def _paper_options(name: Name) -> dict[str, Any]:
    """What the scripts of the paper set in addition to the sizes (measured from state dicts)."""
    options: dict[str, dict[str, Any]] = {
        "p": {"qkv_bias": True},
        "l": {"share_kv": True, "one_kv_head": not (name.hybrid or name.rope)},
    }
    return options.get(name.letter or "", {})


def with_mixer(fields: Collection[str], mixer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``fields`` that another mixer changes.

    Options that the mixer has are kept; heads and a position bias that it cannot have are off.
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
