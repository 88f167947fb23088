"""Match state dicts and files to modules, and report what was loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .files import checked_state, read_weights
from .fitting import adapt, fit, is_computed, resize_table
from .grouping import Part, group_by_name, library_of
from .hints import as_sentence, norm_is_elsewhere, other_fields


class LoadReport(NamedTuple):
    """What :func:`load_weights` did with the keys of the source and of the module.

    Attributes:
        used: keys of the source that were used unchanged.
        resized: keys of the source whose table was interpolated.
        unused: keys of the source that were left out, of another shape or not in the module.
        missing: keys of the module that were left unchanged.
        adapted: keys of the source whose weights were adapted to another number of channels.
        hint: fields with which a ViT would match the weights, or "".
    """

    used: list[str]
    resized: list[str]
    unused: list[str]
    missing: list[str]
    adapted: tuple[str, ...] = ()
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensor{'s' * (len(self.used) != 1)} used"]
        for what, keys in (
            ("resized", self.resized),
            ("adapted to other channels", self.adapted),
            ("left out", self.unused),
            ("missing from the weights", self.missing),
        ):
            parts += [f"{len(keys)} {what}: {_first_keys(keys)}"] if keys else []
        return "; ".join([*parts, self.hint] if self.hint else parts)


def _first_keys(keys: list[str] | tuple[str, ...]) -> str:
    """Return the first five keys, sorted, and the number of the others."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{', '.join(sorted(keys)[:5])}{more}"


class _Match(NamedTuple):
    """The parts of one parameter in the source and in the module, and how they go together.

    ``values`` are the new values of the target's parts if the kind is "used", "resized" or
    "adapted"; ``hint`` says how a misfit could be loaded.
    """

    kind: Literal["used", "resized", "adapted", "ignored", "unexpected", "missing", "misfit"]
    source: list[Part]
    target: list[Part]
    values: list[Tensor]
    hint: str = ""

    @property
    def misfit(self) -> str:
        keys, shapes = " + ".join(part.key for part in self.source), _shapes(self.source)
        if norm_is_elsewhere(self.source, self.target):
            return f"{keys} is not {self.target[0].key}: one is before the pool, the other after it"
        return f"{keys} of shape {shapes} does not fit {_shapes(self.target)}{self.hint}"


def _shapes(parts: list[Part]) -> str:
    return " + ".join(str(tuple(p.tensor.shape)) for p in parts)


def _match(
    module: nn.Module, name: str, source: list[Part], target: list[Part], resize: bool,
    other_positions: bool,
) -> _Match:  # fmt: skip
    if not source:
        return _Match("missing", source, target, [])
    if not target:
        if name == "mask_token":  # of pretraining with masked patches
            return _Match("ignored", source, target, [])
        known = is_computed(module, name, source)
        return _Match("used" if known else "unexpected", source, target, [])
    if norm_is_elsewhere(source, target) or (name == "position" and other_positions):
        return _Match("misfit", source, target, [])
    values = fit(source, target)
    if values is not None:
        return _Match("used", source, target, values)
    resized = resize_table(module, name, source, target)
    if resized is not None and resize:
        return _Match("resized", source, target, resized)
    adapted = adapt(module, name, source, target)
    if adapted is not None and resize:
        return _Match("adapted", source, target, [adapted])
    hint = ", resize=True interpolates it" if resized is not None else ""
    hint = ", resize=True adapts it to other channels" if adapted is not None else hint
    return _Match("misfit", source, target, [], hint)


def _report(matches: list[_Match], hint: str) -> LoadReport:
    def keys(side: Literal["source", "target"], *kinds: str) -> list[str]:
        return sorted(p.key for m in matches if m.kind in kinds for p in getattr(m, side))

    return LoadReport(
        used=keys("source", "used"),
        resized=keys("source", "resized"),
        unused=keys("source", "ignored", "unexpected", "misfit"),
        missing=keys("target", "missing", "misfit"),
        adapted=tuple(keys("source", "adapted")),
        hint=hint,
    )


def _problems(matches: list[_Match]) -> list[str]:
    """The reasons why a strict load fails, as text."""
    missing = [p.key for m in matches if m.kind == "missing" for p in m.target]
    foreign = [p for m in matches if m.kind == "unexpected" for p in m.source]
    unexpected = [p.key for p in foreign if not p.problem]
    kinds = {"missing": missing, "not in the module": unexpected}
    problems = [f"{what}: {_first_keys(keys)}" for what, keys in kinds.items() if keys]
    unconverted = [p.problem for p in foreign if p.problem]
    if len(unconverted) > 3:
        unconverted[3:] = [f"and {len(unconverted) - 3} more"]
    return problems + unconverted + [m.misfit for m in matches if m.kind == "misfit"]


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    resize: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Load weights into a model or mixer; on an error the module is left unchanged.

    Supported keys: ours; those of vision_xformer 0.1.8 to 0.2.0 (ViN, ViP, ViL, FNet, FNet2D);
    those of performer-pytorch, nystrom-attention and linformer, whose modules may also be the
    target; timm's ViT, LeViT, CaiT, XCiT, CrossViT, Swin, PVT v2, ConvMixer, MLP-Mixer and gMLP;
    transformers' CvT; DINOv2 of its authors, without its mask token; and the Compact-Transformers
    of the CCT authors. Prefixes of wrapper modules (``model.``, ``module.``, ``backbone.``,
    ``encoder.``) are ignored, and the state dict may be nested in a checkpoint under
    ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model``.

    Args:
        module: the module to load into.
        weights: a state dict, or the path of one (.safetensors, or a PyTorch file of tensors and
            plain values only).
        resize: adapt the weights to another input shape. Tables that have a row for each token
            (positions, the projections of Linformer) or distance (the bias of LeViT) are
            interpolated to the grid of the module: bicubic on images; prefix rows are kept. A table
            of another library does not store its grid, so it is guessed: same number of rows, else
            same aspect ratio, else square. The first layer of a model is adapted to another number
            of channels as in timm: summed for one channel, repeated and scaled for more.
        strict: require exactly the tensors of the module. Otherwise those that fit are loaded, and
            the report lists the others.

    Returns:
        The keys that were used, resized, adapted, unused and missing.

    Raises:
        ValueError: with ``strict``, if a tensor is missing, unexpected or of another shape; it
            names the keys. Without, if nothing fits. The module is left untouched.
    """
    where = ""
    if isinstance(weights, str | os.PathLike):
        where = f" from {os.fspath(weights)}"
        weights = read_weights(weights)
    state = checked_state(weights)
    own = module.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"this {type(module).__name__} is on the meta device: call to_empty(device=...) first"
        )
    library = library_of(own)
    if library is not None:
        raise ValueError(f"load_weights does not fill modules of {library.name}")
    source, target = group_by_name(state), group_by_name(own)
    fields = other_fields(module, source, target)
    matches = [
        _match(
            module, name, source.get(name, []), target.get(name, []), resize,
            "no_embed_class" in fields,
        )
        for name in sorted(source.keys() | target.keys())
    ]  # fmt: skip
    problems, hint = _problems(matches), as_sentence(fields)
    if (strict and problems) or not any(match.values for match in matches):
        raise ValueError(
            f"weights{where} are not those of this {type(module).__name__}: "
            f"{'; '.join([*problems, hint] if hint else problems)}"
        )
    with torch.no_grad():
        for match in matches:
            if match.values:
                for part, value in zip(match.target, match.values, strict=True):
                    part.tensor.copy_(value)
    return _report(matches, hint)
