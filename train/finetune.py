"""Build the model of a run, with new or pretrained weights, and freeze parts of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import vision_xformer as vx
from vision_xformer.weights import read_weights

from .align import freeze_unmatched
from .atomic import read_state
from .config import ModelConfig
from .model import Sizes, build_base, conversion_of, converted, is_converted
from .pixels import NAMED, Pixels, pixels_of_weights, set_pixels

if TYPE_CHECKING:
    from .loop import Run


def start_model(run: Run, sizes: Sizes) -> nn.Module:
    """Build the model of a run, with ``model.weights`` unless there is a state to resume from.

    Raises:
        ValueError: for a model that cannot be built, weights that do not fit it, or a part to
            freeze that it does not have.
    """
    config, state = run.config, run.folder / "state.pt"
    model = build_base(config.model, sizes)
    if run.resumed and state.is_file():
        pixels = Pixels(*read_state(state).get("pixels", NAMED["half"]))
    else:
        pixels, origin = _pixels(config.model, config.data.normalize)
        pixels = pixels.for_channels(sizes.channels)
        if config.model.weights is not None:
            report = _load(model, config.model, config.model.weights, sizes)
            run.accelerator.print(
                f"model.weights {config.model.weights}: {report}; pixels have {pixels} ({origin})"
            )
    if not is_converted(model):
        converted(model, config.model.convert, sizes)
    set_pixels(model, pixels)
    freeze(model, config.train.freeze)
    freeze_unmatched(model, config.train.loss, sizes)
    if config.train.grad_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except AssertionError as error:  # of timm
            raise ValueError(
                f"train.grad_checkpointing true: {config.model.name} does not support it"
            ) from error
    return model


def _pixels(config: ModelConfig, normalize: str) -> tuple[Pixels, str]:
    """Return the pixel statistics of ``data.normalize``, and where they come from."""
    if normalize != "auto":
        return NAMED[normalize], f"data.normalize {normalize}"
    if config.weights is not None:
        found = pixels_of_weights(Path(config.weights).expanduser(), config.name)
        if found is not None:
            return found, "as the weights expect"
    return NAMED["half"], "a guess; set data.normalize to change it"


def _load(model: nn.Module, config: ModelConfig, file: str, sizes: Sizes) -> str:
    """Load pretrained weights, and return a description of what was loaded."""
    path = Path(file).expanduser()
    try:
        if config.convert.mixer is not None and conversion_of(path).mixer is not None:
            converted(model, config.convert, sizes).load_state_dict(read_weights(path))
            return "all tensors used, of a converted model"
        if not isinstance(model, vx.VisionModel):
            return _load_timm(model, config, path, sizes)
        report = vx.load_weights(model, path, resize=True, strict=False)
    except ValueError as error:  # which names the file
        raise ValueError(f"model.weights: {error}") from error
    except RuntimeError as error:  # of load_state_dict, with a line for each tensor
        lines = str(error).splitlines()
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise ValueError(
            f"model.weights {file} does not fit {config.name}: {lines[:2][-1].strip()}{more}"
        ) from error
    total = len(model.state_dict())
    if len(report.missing) > total / 2:
        raise ValueError(
            f"model.weights {file} has only {total - len(report.missing)} of the {total} tensors "
            f"of {config.name}, so it belongs to another model: {report}"
        )
    return str(report)


def _load_timm(model: nn.Module, config: ModelConfig, path: Path, sizes: Sizes) -> str:
    """Load pretrained weights into a timm model, by timm's own loading of pretrained weights."""
    known: Any = model.pretrained_cfg
    classifiers = known["classifier"]
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    state = read_weights(path)
    weight = state.get(f"{heads[0]}.weight")
    classes = sizes.classes if weight is None else len(weight)
    source: dict[str, Any] = {"file": str(path)}
    new = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] in heads}
    headless = bool(new) and not new.keys() & state.keys()
    if headless:  # the new head is added, so that timm still requires all other tensors
        source = {"state_dict": {**state, **new}}
    overlay = {**source, "num_classes": classes}
    loaded = build_base(config, sizes, pretrained=True, pretrained_cfg_overlay=overlay)
    model.load_state_dict(loaded.state_dict())
    if headless:
        return f"loaded by timm, except {' and '.join(heads)}, which the file does not have"
    head = "" if classes == sizes.classes else f", except {heads[0]} of {classes} classes"
    return f"loaded by timm{head}"


def freeze(model: nn.Module, names: str) -> None:
    """Exclude parts of a model from training.

    Args:
        model: the model.
        names: modules or parameters, separated by spaces; ``blocks.0-5`` are six of them.

    Raises:
        ValueError: for a name that the model does not have, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    parts = {".".join(n.split(".")[: i + 1]) for n in parameters for i in range(n.count(".") + 1)}
    for name in _expand(names.split()):
        if name not in parts:
            near = difflib.get_close_matches(name, sorted(parts), n=1, cutoff=0)
            raise ValueError(
                f"train.freeze {name!r} is not a part of the model with parameters; "
                f"did you mean {near[0]!r}?"
            )
        for own, parameter in parameters.items():
            if f"{own}.".startswith(f"{name}."):
                parameter.requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"train.freeze {names!r} leaves nothing to train")


def _expand(words: Iterable[str]) -> Iterable[str]:
    """Expand ranges such as ``blocks.0-5`` in names."""
    for word in words:
        found = re.fullmatch(r"(.*?)(\d+)-(\d+)(.*)", word)
        if found is None:
            yield word
            continue
        first, last = int(found[2]), int(found[3])
        if last < first:
            raise ValueError(
                f"train.freeze {word!r} is an empty range: did you mean "
                f"{found[1]}{last}-{first}{found[4]}?"
            )
        yield from (f"{found[1]}{i}{found[4]}" for i in range(first, last + 1))


def train_mode(model: nn.Module, loss: str) -> None:
    """Set training mode, except for frozen batch norms, which keep their statistics.

    A model that is matched with its teacher stays in evaluation mode, without dropout, like the
    teacher.
    """
    model.train(loss == "labels")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
