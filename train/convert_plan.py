"""The options of ``convert``: a model, the kernels to compare, and how they are trained."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml

import vision_xformer as vx
from vision_xformer.options import unknown_name_error
from vision_xformer.weights import read_weights

from .config import ConvertConfig, DataConfig, ModelConfig, RunConfig
from .convert_page import RESULTS
from .model import Sizes, build_base, save_weights
from .pixels import NAMED, pixels_of_weights, set_pixels
from .provenance import fingerprint
from .recipes import given_options, parse

# Options of fit that convert sets, and what is given instead
_SET = {
    "model.weights": "--weights, or the weights of the run",
    "model.convert": "--mixer",
    "train.epochs": "--epochs",
    "train.loss": "the two stages",
    "train.teacher": "the model before conversion",
}
_SET_TIMM = {  # also, for a timm model
    "model.name": "--model",
    "model.mixer": "--mixer",
    "model.mixer_options": "--mixer",
}
SCRATCH = ("train.lr", "train.warmup_epochs")  # that only training from scratch uses
Stage = Literal["attention", "features", "scratch"]
STAGES: tuple[Stage, ...] = ("attention", "features")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels to compare, and how they are trained.

    Attributes:
        config: of all runs: model, data, augmentation and training.
        teacher: file of the model before conversion.
        source: hash of the file of weights that it was made from.
        mixers: conversions by name.
        epochs: number of epochs of the two stages.
        lr: peak learning rates of the two stages.
        tokens: numbers of tokens at which time and memory are measured.
        scratch: whether each kernel is also trained from scratch with labels, for as many epochs.
        folder: folder of all runs and results.
    """

    config: RunConfig
    teacher: Path
    source: str
    mixers: dict[str, ConvertConfig]
    epochs: Sequence[int]
    lr: Sequence[float]
    tokens: Sequence[int]
    scratch: bool
    folder: Path

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is trained for each kernel."""
        return (*STAGES, "scratch") if self.scratch else STAGES

    def config_of(self, name: str, stage: Stage) -> RunConfig:
        """Return the configuration of one stage of one kernel."""
        folder = self.folder / name.replace(":", "-")
        weights: Path | None = self.teacher
        if stage == "features":
            weights = folder / "attention" / "best.safetensors"
        train = self.config.train
        if stage == "scratch":
            weights, train = None, dataclasses.replace(train, epochs=sum(self.epochs))
        else:
            i = STAGES.index(stage)
            train = dataclasses.replace(
                train, epochs=self.epochs[i], lr=self.lr[i], loss=stage,
                teacher=str(self.teacher), warmup_epochs=0.1,
            )  # fmt: skip
        model = dataclasses.replace(
            self.config.model, weights=str(weights) if weights else None,
            convert=self.mixers[name],
        )  # fmt: skip
        run_dir = str(folder / stage)
        return dataclasses.replace(self.config, model=model, train=train, run_dir=run_dir)

    def check(self) -> None:
        """Check numbers of tokens and all stages, before the first of them is trained.

        Raises:
            ValueError: for a value out of range.
        """
        for count in self.tokens:
            if count < 1:
                raise ValueError(f"--tokens {count} must be at least 1")
        for stage in self.stages:
            try:
                self.config_of(next(iter(self.mixers)), stage).check()
            except ValueError as error:
                raise ValueError(f"stage {stage}: {error}") from error


def parser() -> argparse.ArgumentParser:
    """The options of ``convert``; all others are those of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="python -m train convert",
        description="Convert the attention of a trained model, retrain it without labels, and "
        "compare kernels. Run the same command again to resume. Other options are those of fit, "
        "except for those that convert sets.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder of a run, or timm:NAME")
    parser.add_argument("--weights", type=Path, help="file of weights, for a timm model")
    parser.add_argument(
        "--mixer", required=True, nargs="+", metavar="KERNEL[:OPTION=VALUE...]",
        help="kernels with their options, such as nystrom:landmarks=64; layers=4-11 selects "
        "layers, and center_keys=false turns centering off",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, nargs=2, default=(1, 2), help="of the two stages")
    parser.add_argument("--lr", type=float, nargs=2, default=(1e-3, 3e-4), help="of the two stages")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=(), metavar="N",
        help="numbers of tokens at which to measure time and memory before and after",
    )  # fmt: skip
    parser.add_argument(
        "--scratch", action="store_true",
        help="also train each kernel from scratch with labels, for as many epochs",
    )  # fmt: skip
    return parser


def conversion_of(text: str) -> ConvertConfig:
    """Parse ``nystrom:landmarks=64:layers=0-3``.

    Raises:
        ValueError: for an unknown kernel, or a part that is not ``option=value``.
    """
    mixer, *words = text.split(":")
    if mixer not in vx.KERNELS:
        raise unknown_name_error("--mixer", mixer, vx.KERNELS.names())
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--mixer {text}: {word!r} must have the form option=value")
        options[name] = yaml.safe_load(value)
    centered, layers = options.pop("center_keys", None), options.pop("layers", None)
    if layers is not None:
        first, _, last = str(layers).partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ValueError(
                f"--mixer {text}: layers {layers} must be an index or a range like 0-3"
            )
        layers = list(range(int(first), int(last or first) + 1))
    return ConvertConfig(mixer, options, layers, centered)


def plan_of(arguments: list[str]) -> Plan:
    """Parse the arguments of ``convert``.

    Raises:
        ValueError: for an invalid model, kernel or option.
    """
    own, others = parser().parse_known_args(arguments)
    given, is_timm = parse(others), own.model.startswith("timm:")
    _check_options(given_options(others), is_timm, own.scratch)
    if given.run_dir is None:
        raise ValueError("run_dir is needed: name a folder for the converted models")
    folder = Path(given.run_dir).expanduser()
    if is_timm:
        if own.weights is None:
            raise ValueError(f"--weights is needed: a file with weights of {own.model}")
        model, config = ModelConfig(own.model, options=given.model.options), given
        teacher, source = folder / "teacher.safetensors", fingerprint(own.weights.expanduser())
    else:
        run = Path(own.model).expanduser()
        teacher = run / "best.safetensors"
        if not teacher.is_file():
            raise ValueError(f"--model {run} is not a run with weights: it has no {teacher.name}")
        config, source = _over(parse([], run / "config.yaml"), others), fingerprint(teacher)
        model = config.model
    config = dataclasses.replace(config, model=dataclasses.replace(model, weights=str(teacher)))
    # their modules may be among the imports
    mixers = {text: conversion_of(text) for text in own.mixer}
    stages = own.epochs, own.lr
    plan = Plan(config, teacher, source, mixers, *stages, own.tokens, own.scratch, folder)
    plan.check()
    if is_timm and not (teacher.is_file() and (folder / RESULTS).is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        _write_teacher(teacher, model, own.weights, config.data)
    return plan


def _check_options(names: Sequence[str], is_timm: bool, scratch: bool) -> None:
    """Raise a ValueError for options of ``fit`` that would have no effect."""
    taken = _SET | _SET_TIMM if is_timm else _SET
    for name in names:
        for option, instead in taken.items():
            if name == option or name.startswith(f"{option}."):
                raise ValueError(f"{name} is not an option of convert: it is set by {instead}")
        if name in SCRATCH and not scratch:
            raise ValueError(f"{name} has an effect only with --scratch; the stages have --lr")


def _over(base: RunConfig, others: list[str]) -> RunConfig:
    """Parse options of ``fit``, with model, data and augmentation of a run as defaults.

    The modules that the run imports, which its model may need, are kept.
    """
    augment = dataclasses.replace(base.augment, mixup=0.0, cutmix=0.0)
    balance = "none" if base.data.balance == "loss" else base.data.balance
    data = dataclasses.replace(base.data, balance=balance)
    parts = {"model": base.model, "data": data, "augment": augment}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        text = yaml.safe_dump({n: dataclasses.asdict(cast(Any, p)) for n, p in parts.items()})
        recipe.write_text(text, encoding="utf-8")
        config = parse([f"--config={recipe}", *others])
    modules = f"{base.imports} {config.imports or ''}".split()
    return dataclasses.replace(config, imports=" ".join(dict.fromkeys(modules)))


def _write_teacher(path: Path, config: ModelConfig, weights: Path, data: DataConfig) -> None:
    """Write a timm model to a file with its weights and the recipe to rebuild it."""
    import timm

    known: Any = timm.get_pretrained_cfg(config.name.removeprefix("timm:"))
    if known is None:
        raise ValueError(f"--model {config.name} is not a timm model with pretrained weights")
    state = read_weights(weights)
    classifier = known.classifier if isinstance(known.classifier, str) else known.classifier[0]
    head = state.get(f"{classifier}.weight")
    classes = known.num_classes if head is None else len(head)
    sizes = Sizes(data.image_size or known.input_size[1], known.input_size[0], classes)
    overlay = {"file": str(weights), "num_classes": classes}
    model = build_base(config, sizes, pretrained=True, pretrained_cfg_overlay=overlay)
    set_pixels(model, pixels_of_weights(weights, config.name) or NAMED["half"])
    save_weights(model, path, config, sizes)
