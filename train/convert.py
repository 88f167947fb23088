"""Convert the attention of a trained model, retrain it without labels, and compare kernels."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import matplotlib as mpl
import torch
import yaml
from accelerate import PartialState
from matplotlib.figure import Figure
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.options import unknown_name_error
from vision_xformer.weights import read_weights

from .atomic import read_json, write_whole
from .augment import plain
from .config import ConvertConfig, DataConfig, ModelConfig, RunConfig
from .devices import pick_device
from .evaluation import accuracy, predict
from .html import Section, Table, write_page
from .loop import Run
from .model import Sizes, build_base, load_model, save_weights
from .pixels import NAMED, pixels_of_weights, set_pixels
from .plots import STYLE
from .recipes import parse
from .run_dir import discard
from .signals import Interrupted

Stage = Literal["attention", "features", "scratch"]
_STAGES: tuple[Stage, ...] = ("attention", "features")
_COMPARED = 64  # validation images whose features are compared with the teacher's
_NOTE = (
    "error: |ours - theirs| / |theirs| of the attention output, given the teacher's input, mean "
    "over layers; cosine: similarity of the last features; agreement: fraction of equal "
    "predictions; all on validation images after stage 2. The minutes do not include training from "
    "scratch."
)
_COLUMNS = {
    "swap": "after the swap", "attention": "after stage 1", "features": "after stage 2",
    "scratch": "from scratch",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels to compare, and how they are trained.

    Attributes:
        config: of all runs: model, data, augmentation and training.
        teacher: file of the model before conversion.
        mixers: conversions by name.
        epochs: number of epochs of the two stages.
        lr: peak learning rates of the two stages.
        scratch: whether each kernel is also trained from scratch with labels, for as many epochs.
        folder: folder of all runs and results.
    """

    config: RunConfig
    teacher: Path
    mixers: dict[str, ConvertConfig]
    epochs: Sequence[int]
    lr: Sequence[float]
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
        config = _over(parse(["--config", str(run / "config.yaml")]), others)
        model = config.model
    config = dataclasses.replace(config, model=dataclasses.replace(model, weights=str(teacher)))
    return Plan(config, teacher, mixers, own.epochs, own.lr, own.scratch, folder)


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
        return parse(["--config", str(recipe), *others])


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
        The table of results.
    """
    path = plan.folder / "conversion.json"
    plan.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = read_json(path, dict) if path.is_file() else {"rows": {}}
    for name, conversion in plan.mixers.items():
        row = found["rows"].setdefault(name, {})
        stages: tuple[Stage, ...] = (*_STAGES, "scratch") if plan.scratch else _STAGES
        for stage in stages:
            if stage not in row:
                _train(plan, name, conversion, stage, found)
    if PartialState().is_main_process:
        write_page(plan.folder / "conversion.html", "Conversions", [section(found)])
    return table(found).text()


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
            print(f"{name}: test top-1 {top1:.2%} {_COLUMNS[what]}", flush=True)

    try:
        if run.teacher is not None and "teacher" not in found:
            found["teacher"] = accuracy(*_predict(run, run.teacher)).top1
        if stage == "attention" and "swap" not in row:
            note("swap", accuracy(*run.predict(run.data.test)).top1)
        test = run.fit()
    except (ValueError, OSError):
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


def table(found: dict[str, Any]) -> Table:
    """Tabulate the accuracy after each stage and the distance from the teacher at the end."""
    rows = []
    for name, row in found["rows"].items():
        last = row.get("features", {})
        minutes = sum(row.get(stage, {}).get("minutes", 0.0) for stage in _STAGES)
        rows.append(
            [name.replace(":", ", ")]
            + [f"{row[c]['test_top1']:.2%}" if c in row else "" for c in _COLUMNS]
            + [f"{last[c]:.3f}" if c in last else "" for c in ("error", "cosine")]
            + [f"{last['agreement']:.1%}" if "agreement" in last else "", f"{minutes:.1f}"]
        )
    heads = ["mixer", *_COLUMNS.values(), "error", "cosine", "agreement", "minutes"]
    caption = f"test top-1; the teacher has {found['teacher']:.2%}"
    return Table(heads, [["teacher", f"{found['teacher']:.2%}", *[""] * 7], *rows], caption)


def section(found: dict[str, Any]) -> Section:
    """Return the figure and the table of the conversions in conversion.json."""
    names = list(found["rows"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.6 + 0.5 * len(names)))
        axis = figure.subplots()
        axis.axvline(100 * found["teacher"], color="#57606a", linestyle="--", label="teacher")
        for (key, label), marker in zip(_COLUMNS.items(), "xos^", strict=True):
            points = [
                (100 * row[key]["test_top1"], i)
                for i, row in enumerate(found["rows"].values())
                if key in row
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker, label=label, markersize=8)
        axis.set_yticks(range(len(names)), [name.replace(":", ", ") for name in names])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel("test top-1, %")
        axis.grid(axis="x", color="#eaeef2")
        figure.legend(*axis.get_legend_handles_labels(), ncols=5, frameon=False, loc="upper left")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    return Section("Conversions", figure, [table(found)], [_NOTE])


def break_even(plan: Plan, conversion: ConvertConfig) -> vx.BreakEven:
    """Measure the number of tokens from which the kernel is faster than softmax."""
    model, sizes = load_model(plan.teacher)
    report = vx.convert(
        model, conversion.mixer or "", layers=conversion.layers, image_size=sizes.image_size,
        center_keys=conversion.center_keys, **conversion.options,
    )  # fmt: skip
    device = pick_device(plan.config.train.device)
    return report.break_even(device=device)


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
