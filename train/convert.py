"""Convert the attention of a trained model, retrain it without labels, and compare kernels."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from accelerate import PartialState
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.options import unknown_name_error
from vision_xformer.weights import read_weights

from . import convert_page
from .atomic import read_json, write_whole
from .augment import plain
from .config import ConvertConfig, DataConfig, ModelConfig, RunConfig
from .convert_cost import TEACHER, image_sizes, measure_cost
from .convert_page import COLUMNS
from .devices import pick_device
from .evaluation import accuracy, predict
from .loop import Run
from .model import Sizes, build_base, load_model, save_weights
from .pixels import NAMED, pixels_of_weights, set_pixels
from .recipes import parse
from .run_dir import discard
from .signals import Interrupted

Stage = Literal["attention", "features", "scratch"]
_STAGES: tuple[Stage, ...] = ("attention", "features")
_COMPARED = 64  # validation images whose features are compared with the teacher's


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels to compare, and how they are trained.

    Attributes:
        config: of all runs: model, data, augmentation and training.
        teacher: file of the model before conversion.
        mixers: conversions by name.
        epochs: number of epochs of the two stages.
        lr: peak learning rates of the two stages.
        tokens: numbers of tokens at which time and memory are measured.
        scratch: whether each kernel is also trained from scratch with labels, for as many epochs.
        folder: folder of all runs and results.
    """

    config: RunConfig
    teacher: Path
    mixers: dict[str, ConvertConfig]
    epochs: Sequence[int]
    lr: Sequence[float]
    tokens: Sequence[int]
    scratch: bool
    folder: Path


def parser() -> argparse.ArgumentParser:
    """The options of ``convert``; all others are those of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="python -m train convert",
        description="Convert the attention of a trained model, retrain it without labels, and "
        "compare kernels. Run the same command again to resume. All options of fit are accepted.",
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
    mixers = {text: conversion_of(text) for text in own.mixer}
    given = parse(others)
    if given.run_dir is None:
        raise ValueError("run_dir is needed: name a folder for the converted models")
    folder = Path(given.run_dir).expanduser()
    if own.model.startswith("timm:"):
        if own.weights is None:
            raise ValueError(f"--weights is needed: a file with weights of {own.model}")
        model, config = ModelConfig(own.model, options=given.model.options), given
        teacher = folder / "teacher.safetensors"
        if not teacher.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _write_teacher(teacher, model, own.weights, config.data)
    else:
        run = Path(own.model).expanduser()
        teacher = run / "best.safetensors"
        if not teacher.is_file():
            raise ValueError(f"--model {run} is not a run with weights: it has no {teacher.name}")
        config = _over(parse([], run / "config.yaml"), others)
        model = config.model
    config = dataclasses.replace(config, model=dataclasses.replace(model, weights=str(teacher)))
    return Plan(config, teacher, mixers, own.epochs, own.lr, own.tokens, own.scratch, folder)


def _over(base: RunConfig, others: list[str]) -> RunConfig:
    """Parse options of ``fit``, with model, data and augmentation of a run as defaults."""
    augment = dataclasses.replace(base.augment, mixup=0.0, cutmix=0.0)
    balance = "none" if base.data.balance == "loss" else base.data.balance
    data = dataclasses.replace(base.data, balance=balance)
    parts = {"model": base.model, "data": data, "augment": augment}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        text = yaml.safe_dump({n: dataclasses.asdict(cast(Any, p)) for n, p in parts.items()})
        recipe.write_text(text, encoding="utf-8")
        return parse([f"--config={recipe}", *others])


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


def run_plan(plan: Plan) -> str:
    """Convert, train and compare all kernels of a plan; write conversion.json and the page.

    Returns:
        The tables of results.
    """
    sizes = _image_sizes(plan)
    path = plan.folder / "conversion.json"
    plan.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = read_json(path, dict) if path.is_file() else {"rows": {}}
    for name, conversion in plan.mixers.items():
        row = found["rows"].setdefault(name, {})
        stages: tuple[Stage, ...] = (*_STAGES, "scratch") if plan.scratch else _STAGES
        for stage in stages:
            if stage not in row:
                _train(plan, name, conversion, stage, found)
    if not PartialState().is_main_process:
        return ""
    if sizes:
        _add_cost(plan, sizes, found)
    convert_page.write(plan.folder, found)
    tables = [convert_page.table(found)]
    if sizes:
        tables.append(convert_page.cost_table(found["cost"]))
    return "\n\n".join(f"{table.caption}\n{table.text()}" for table in tables)


def _image_sizes(plan: Plan) -> dict[int, int]:
    """Return the image size in pixels for each number of tokens of a plan.

    Raises:
        ValueError: for a number of tokens that no image size has.
    """
    if not plan.tokens:
        return {}
    report, size = _report(plan, next(iter(plan.mixers.values())))
    now = math.prod(report.site.queries.shape)
    return dict(zip(plan.tokens, image_sizes(size, now, plan.tokens), strict=True))


def _report(plan: Plan, conversion: ConvertConfig) -> tuple[vx.Report, int]:
    """Convert the teacher: the report, and the image size in pixels."""
    model, sizes = load_model(plan.teacher)
    report = vx.convert(
        model, conversion.mixer or "", layers=conversion.layers, image_size=sizes.image_size,
        center_keys=conversion.center_keys, **conversion.options,
    )  # fmt: skip
    return report, sizes.image_size


def _add_cost(plan: Plan, sizes: dict[int, int], found: dict[str, Any]) -> None:
    """Measure time and memory at the numbers of tokens that lack a result of a kernel."""
    known = {(row["name"], row["tokens"]) for row in found.get("cost", [])}
    names = {TEACHER, *plan.mixers}
    left = {n: size for n, size in sizes.items() if any((name, n) not in known for name in names)}
    rows = measure_cost(plan.config, plan.mixers, left, load_model(plan.teacher)[1])
    kept = [row for row in found.get("cost", []) if row["tokens"] not in left]
    found["cost"] = sorted([*kept, *rows], key=lambda row: row["tokens"])
    write_whole(plan.folder / "conversion.json", json.dumps(found, indent=2) + "\n")


def _train(
    plan: Plan, name: str, conversion: ConvertConfig, stage: Stage, found: dict[str, Any]
) -> None:
    """Train or resume one stage of one kernel, and write the results."""
    path, row = plan.folder / "conversion.json", found["rows"][name]
    config = _config(plan, name, conversion, stage)
    folder = Path(config.run_dir or "")
    run = Run(config, folder if (folder / "config.yaml").is_file() else None)

    def note(what: str, top1: float, **more: float) -> None:
        row[what] = {"test_top1": top1, **more, **_distance(run)}
        if run.main:
            write_whole(path, json.dumps(found, indent=2) + "\n")
            print(f"{name}: test top-1 {top1:.2%} {COLUMNS[what]}", flush=True)

    try:
        if run.teacher is not None and "teacher" not in found:
            found["teacher"] = accuracy(*_predict(run, run.teacher)).top1
        if stage == "attention" and "swap" not in row:
            note("swap", accuracy(*run.predict(run.data.test)).top1)
        test = run.fit()
    except (ValueError, OSError, KeyboardInterrupt):
        discard(run)
        raise
    note(stage, test.top1, minutes=run.seconds / 60)


def _predict(run: Run, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Predict the test images of a run with another model: logits (N, classes), classes (N,)."""
    data = run.config.data
    return predict(model, run.data.test, run.accelerator, run.batch_size, data.workers)


def _distance(run: Run) -> dict[str, float]:
    """Compare the model of a run with its teacher on validation images."""
    if run.teacher is None:
        return {}
    count = min(_COMPARED, len(run.data.val))
    images, _ = next(run.data.val.batches([torch.arange(count)], run.device, 0))
    found = vx.compare(run.best_model, run.teacher, plain(images, run.pixels))
    error = sum(found.errors.values()) / len(found.errors)
    agreement = {} if found.agreement is None else {"agreement": found.agreement}
    return {"error": error, "cosine": found.cosine, **agreement}


def _config(plan: Plan, name: str, conversion: ConvertConfig, stage: Stage) -> RunConfig:
    """Return the configuration of one stage of one kernel."""
    folder = plan.folder / name.replace(":", "-")
    weights: Path | None = plan.teacher
    if stage == "features":
        weights = folder / "attention" / "best.safetensors"
    train = plan.config.train
    if stage == "scratch":
        weights, train = None, dataclasses.replace(train, epochs=sum(plan.epochs))
    else:
        i = _STAGES.index(stage)
        train = dataclasses.replace(
            train, epochs=plan.epochs[i], lr=plan.lr[i], loss=stage, teacher=str(plan.teacher),
            warmup_epochs=0.1,
        )  # fmt: skip
    model = dataclasses.replace(
        plan.config.model, weights=str(weights) if weights else None, convert=conversion
    )
    return dataclasses.replace(plan.config, model=model, train=train, run_dir=str(folder / stage))


def break_even(plan: Plan, conversion: ConvertConfig) -> vx.BreakEven:
    """Measure the number of tokens from which the kernel is faster than softmax."""
    report, _ = _report(plan, conversion)
    return report.break_even(device=pick_device(plan.config.train.device))


def main(arguments: list[str]) -> None:
    """The program ``python -m train convert``.

    Raises:
        ValueError: for a model that cannot be converted or trained.
    """
    plan = plan_of(arguments)
    try:
        text = run_plan(plan)
    except Interrupted as interrupted:
        print("stopped; run the same command again to resume", file=sys.stderr)
        raise SystemExit(128 + interrupted.number) from None
    if PartialState().is_main_process:
        print(text)
        for name, conversion in plan.mixers.items():
            print(f"\n{name}\n{break_even(plan, conversion)}")
        print(f"\nthe page: {plan.folder / 'conversion.html'}")
