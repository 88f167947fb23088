"""Convert the attention of a trained model, retrain it without labels, and compare kernels."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.weights import read_weights

from . import convert_page
from .atomic import read_json, write_whole
from .augment import plain
from .checkpoint import data_fingerprint, settings_of
from .config import ConvertConfig
from .convert_cost import TEACHER, image_sizes, measure_cost
from .convert_page import COLUMNS, RESULTS
from .convert_plan import SCRATCH, Plan, Stage, plan_of
from .devices import pick_device
from .evaluation import accuracy, predict
from .loop import Run
from .model import load_model
from .provenance import digest
from .run_dir import discard
from .signals import Interrupted

_COMPARED = 64  # validation images whose features are compared with the teacher's


def run_plan(plan: Plan) -> str:
    """Convert, train and compare all kernels of a plan; write conversion.json and the page.

    Returns:
        The tables of results.
    """
    sizes = _image_sizes(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    found = _results(plan)
    for name in plan.mixers:
        row = found["rows"].setdefault(name, {})
        for stage in plan.stages:
            if stage not in row:
                _train(plan, name, stage, found)
    if not PartialState().is_main_process:
        return ""
    if sizes:
        _add_cost(plan, sizes, found)
    convert_page.write(plan.folder, found)
    tables = [convert_page.table(found)]
    if sizes:
        tables.append(convert_page.cost_table(found["cost"]))
    return "\n\n".join(f"{table.caption}\n{table.text()}" for table in tables)


def _results(plan: Plan) -> dict[str, Any]:
    """Read the results so far, or start them.

    Raises:
        ValueError: if they are of other settings; it names the first that differs.
    """
    path = plan.folder / RESULTS
    settings = {
        "source": plan.source,
        "epochs": list(plan.epochs),
        "lr": list(plan.lr),
        **settings_of(plan.config),
    }
    # instead of paths, the source is compared
    for option in ("model.weights", "train.teacher", *(() if plan.scratch else SCRATCH)):
        del settings[option]
    found: dict[str, Any] = read_json(path, dict) if path.is_file() else {"rows": {}}
    then = found.get("settings", {})
    for name, value in settings.items():
        if then.get(name, value) != value:
            raise ValueError(
                f"{path} has results for {name} {then[name]}, not {value}: name another run_dir, "
                "or give the same options as before"
            )
    found["settings"] = then | settings
    return found


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
    write_whole(plan.folder / RESULTS, json.dumps(found, indent=2) + "\n")


def _train(plan: Plan, name: str, stage: Stage, found: dict[str, Any]) -> None:
    """Train or resume one stage of one kernel, and write the results."""
    path, row = plan.folder / RESULTS, found["rows"][name]
    config = plan.config_of(name, stage)
    folder = Path(config.run_dir or "")
    run = Run(config, folder if (folder / "config.yaml").is_file() else None)

    def note(what: str, top1: float, **more: float) -> None:
        row[what] = {"test_top1": top1, **more, **_distance(run)}
        if run.main:
            write_whole(path, json.dumps(found, indent=2) + "\n")
            print(f"{name}: test top-1 {top1:.2%} {COLUMNS[what]}", flush=True)

    try:
        _check_images(run, path, found)
        if run.teacher is not None and "teacher" not in found:
            found["teacher"] = accuracy(*_predict(run, run.teacher)).top1
        if stage == "attention" and "swap" not in row:
            if run.step:  # the weights are no longer those after the swap
                raise ValueError(f"{folder} has a run that {path} does not know: remove {folder}")
            note("swap", accuracy(*run.predict(run.data.test)).top1)
        top1 = _test_top1(run)
    except (ValueError, OSError, KeyboardInterrupt):
        discard(run)
        raise
    note(stage, top1, minutes=run.seconds / 60)


def _check_images(run: Run, path: Path, found: dict[str, Any]) -> None:
    """Raise a ValueError if the results so far are of other images than a run; or note its images.

    Results of earlier versions do not tell.
    """
    images = digest(json.dumps(data_fingerprint(run)).encode())
    if found.setdefault("images", images) != images:
        raise ValueError(
            f"{path} has results for other images or classes than {run.config.data.name} in "
            f"{run.config.data.root}: name another run_dir, or restore them"
        )


def _test_top1(run: Run) -> float:
    """Train a run and return its test accuracy; or that of a complete one, with its weights."""
    result = run.folder / "result.json"
    if not (run.finished and result.is_file()):
        return run.fit().top1
    with run.lock:
        run.best_model.load_state_dict(read_weights(run.folder / "best.safetensors"))
    return float(read_json(result, dict)["test_top1"])


def _predict(run: Run, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Predict the test images of a run with another model: logits (N, classes), classes (N,)."""
    data = run.config.data
    return predict(model, run.data.test, run.accelerator, run.part_size, data.workers)


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
