"""The resume state of a run: everything that the next step depends on, in one file."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate.utils import gather_object

from vision_xformer.weights import read_weights

from .atomic import read_state, write_state, write_whole
from .config import RunConfig
from .evaluation import Accuracy
from .lock import hold
from .log import log
from .measure import known_peak
from .model import Sizes, save_weights
from .pixels import pixels_of
from .text import reason

if TYPE_CHECKING:
    from .loop import Run

# Options that may change when a run is resumed: they affect where it runs and how long, but not the
# steps that are already done.
FREE = ("train.epochs", "train.patience", "train.compile", "train.device", "train.save_every",
        "data.root", "data.mirror", "data.in_memory", "data.workers",
        "data.skip_broken")  # fmt: skip


def resolved(config: RunConfig) -> str:
    """The whole configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def mean_over_processes(value: float) -> float:
    """The mean of a number of each process."""
    values = gather_object([value])
    return float(sum(values) / len(values))


def data_fingerprint(run: Run) -> list[str]:
    """The classes and images that a state belongs to."""
    data = run.data
    return [*data.classes, *(part.fingerprint() for part in (data.train, data.val, data.test))]


def save_state(run: Run) -> None:
    """Write the state of a run to its folder, atomically; all processes call it."""
    loss_sum = mean_over_processes(run.loss_sum)
    if not run.main:
        return
    scaler = run.accelerator.scaler
    state = {
        "config": resolved(run.config),
        "data": data_fingerprint(run),
        "step": run.step,
        "rows": run.rows,
        "best": run.best,
        "loss_sum": loss_sum,
        "images_seen": run.images_seen,
        "seconds": run.seconds,
        "pixels": tuple(pixels_of(run.model)),
        "model": run.model.state_dict(),
        "ema": None if run.ema is None else run.ema.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    write_state(run.folder / "state.pt", state)


def save_epoch(run: Run, is_best: bool) -> None:
    """Write metrics, last and best weights, and the state after an epoch."""
    if run.main:
        write_metrics(run.folder, run.rows)
        for name in ("last", "best") if is_best else ("last",):
            path = run.folder / f"{name}.safetensors"
            save_weights(run.best_model, path, run.config.model, Sizes.of(run.data))
    run.best = max(run.best, run.rows[-1]["val_top1"])
    save_state(run)


def save_result(run: Run, test: Accuracy) -> None:
    """Write result.json: validation and test accuracy, parameters, peak memory and time."""
    peak = known_peak()
    result = {
        "val_top1": run.best,
        "test_top1": test.top1,
        "test_top5": test.top5,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "peak_mib": None if peak is None else peak / 2**20,
        "minutes": run.seconds / 60,
    }
    write_whole(run.folder / "result.json", json.dumps(result, indent=2) + "\n")
    epochs, c = len(run.rows), run.config.train
    early = f", stopped early by train.patience {c.patience}" if epochs < c.epochs else ""
    log(run, f"test top-1 {test.top1:.2%}, top-5 {test.top5:.2%} after epoch {epochs}{early}")


def write_metrics(folder: Path, rows: list[dict[str, float]]) -> None:
    """Write metrics.csv, with a line for each epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "metrics.csv", text.getvalue())


def take_up(run: Run) -> contextlib.ExitStack:
    """Resume a run from the state in its folder, or start anew if there is none.

    Returns:
        The lock of the folder, to be closed when the run ends.

    Raises:
        ValueError: if another process trains the run, or the state belongs to another
            configuration or to other images or classes.
    """
    with contextlib.ExitStack() as lock:
        lock.enter_context(hold(run.folder, run.main))
        _load_state(run)
        return lock.pop_all()


def _load_state(run: Run) -> None:
    path = run.folder / "state.pt"
    if not path.is_file():
        if (run.folder / "result.json").is_file():
            raise ValueError(f"{run.folder} has a result.json, but no state.pt to resume from")
        return
    state = read_state(path)
    try:
        _check(run, state)
        run.step, run.rows, run.best = state["step"], state["rows"], state["best"]
        run.loss_sum = float(state["loss_sum"])
        run.images_seen, run.seconds = state["images_seen"], state["seconds"]
        run.model.load_state_dict(state["model"])
        if run.ema is not None:
            run.ema.load_state_dict(state["ema"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.accelerator.scaler is not None and state["scaler"] is not None:
            run.accelerator.scaler.load_state_dict(state["scaler"])
    except (KeyError, TypeError, AttributeError, RuntimeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a state of this run: {reason(error)}") from error
    if run.rows:
        _check_best(run.folder / "best.safetensors")
    if len(run.rows) > run.config.train.epochs:
        raise ValueError(
            f"train.epochs {run.config.train.epochs} must be at least {len(run.rows)}, the number "
            f"of epochs that {run.folder} already has"
        )


def _check_best(path: Path) -> None:
    """Raise a ValueError if the best weights so far, which are tested at the end, are lost."""
    try:
        read_weights(path)
    except ValueError as error:  # which names the file
        raise ValueError(
            f"{error}; these are the best weights so far: restore the file, or replace it by a "
            "copy of last.safetensors"
        ) from error


def complete(folder: Path, patience: int = 0) -> ValueError:
    """Return the error for a run with nothing left to train.

    Args:
        folder: of the run.
        patience: the value of ``train.patience`` that ended it; 0 if it trained all epochs.
    """
    more = (
        f"--train.patience with a number above {patience}, or 0 to train all epochs"
        if patience
        else "--train.epochs with a higher number"
    )
    return ValueError(
        f"resume {folder}: the run is complete, see its result.json; to train longer, add {more}"
    )


def _check(run: Run, state: dict[str, Any]) -> None:
    path, data = run.folder / "state.pt", run.config.data
    if _numbers(state["config"]) != _numbers(resolved(run.config)):
        raise ValueError(
            f"{path} belongs to another configuration than its config.yaml: undo the changes "
            "there, or start a new run"
        )
    *then, test_then = state["data"]
    *now, test_now = data_fingerprint(run)
    if then != now:
        raise ValueError(
            f"{path} belongs to a run with other images or classes than {data.name} in "
            f"{data.root}: restore them, or start a new run"
        )
    if test_then != test_now and run.main:
        text = f"warning: the test images in {data.root} have changed since the run was started"
        print(text, file=sys.stderr)


def _numbers(config: str) -> dict[str, Any]:
    """Parse a configuration and remove the options that may change when a run is resumed."""
    found = _filled(yaml.safe_load(config), dataclasses.asdict(RunConfig()))
    del found["run_dir"]
    for option in FREE:
        part, name = option.split(".")
        del found[part][name]
    return found


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The options that the steps of a run depend on, by name, such as "train.lr"."""
    settings: dict[str, Any] = {}
    for name, value in _numbers(resolved(config)).items():
        parts = value if isinstance(value, dict) else {}
        settings |= {f"{name}.{option}": v for option, v in parts.items()} or {name: value}
    return settings


def _filled(found: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of the fields that a configuration of an earlier version does not have."""
    filled = defaults | found
    for name, value in defaults.items():
        if isinstance(value, dict):
            filled[name] = _filled(filled[name], value)
    return filled
