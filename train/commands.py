"""What can be done with the folders of runs: evaluate, predict, report."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .atomic import read_json, read_state, read_yaml
from .checkpoint import complete
from .classify import Classifier, find_files, write_csv
from .config import RunConfig
from .data import Splits, load_data
from .devices import make_accelerator
from .evaluation import accuracy, predict
from .model import load_model, resized
from .report import name_of, page, table
from .text import error_text, escaped


def resumable(path: Path, changed: bool) -> Path:
    """The folder of a run that can be resumed.

    Args:
        path: of the folder.
        changed: whether options are changed, so that a complete run may be trained further.

    Raises:
        ValueError: if there is no run, or it is complete.
    """
    folder = path.expanduser()
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"resume {folder}: there is no run (no config.yaml)")
    if (folder / "result.json").is_file() and not changed:
        raise complete(folder)
    return folder


def output_file(path: Path, option: str = "--out") -> Path:
    """Check the path of an output file, before anything is computed.

    Raises:
        ValueError: unless a file can be there.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{option} {path} must be a file in a folder that exists")
    return path


def folder_of(path: Path) -> Path:
    """The folder of a run with weights.

    Raises:
        ValueError: for a folder without them; it names what is missing.
    """
    folder = path.expanduser()
    for name in ("config.yaml", "best.safetensors", "classes.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a run with weights: it has no {name}")
    return folder


def evaluate(folder: Path, config: RunConfig, split: str) -> str:
    """Measure the accuracy of the best weights of a run on images of its classes.

    Args:
        folder: of the run.
        config: of the run; ``data.root``, ``data.image_size`` and ``data.skip_broken`` may differ.
            Position tables are resized to the image size.
        split: "test" or "val".

    Raises:
        ValueError: if the data has other classes or channels than the run, or no labels.
    """
    if config.data.name == "unlabeled":
        raise ValueError(
            f"{folder} was trained on images without labels (data.name unlabeled), so there is "
            "nothing to compare its predictions with"
        )
    accelerator = make_accelerator(config.train)
    path = folder / "best.safetensors"
    model, sizes = load_model(path)
    config.data.image_size = config.data.image_size or sizes.image_size
    data = load_data(config.data, accelerator.device)
    for note in data.notes:
        print(escaped(note), file=sys.stderr)
    if data.classes != read_json(folder / "classes.json", list):
        raise ValueError(f"{config.data.root} has other classes than {folder}/classes.json")
    if text := _changed(folder, config, data):
        print(escaped(text), file=sys.stderr)
    if data.channels != sizes.channels:
        raise ValueError(
            f"the images in {config.data.root} must have {sizes.channels} channels, like those of "
            f"the run, not {data.channels}"
        )
    if data.image_size != sizes.image_size:
        model = resized(model, path, data.image_size, sizes.channels)
    images = {"test": data.test, "val": data.val}[split]
    logits, labels = predict(
        model.to(accelerator.device), images, accelerator, config.data.batch_size,
        config.data.workers,
    )  # fmt: skip
    found = accuracy(logits, labels)
    return (
        f"{split} top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, loss {found.loss:.4f} "
        f"({len(labels):,} images)"
    )


def _changed(folder: Path, config: RunConfig, data: Splits) -> str:
    """Return a warning if images that a run was trained on may now be in another split."""
    state, root = folder / "state.pt", read_yaml(folder / "config.yaml")["data"]["root"]
    here, there = (Path(name).expanduser().resolve() for name in (config.data.root, root))
    if here != there or not state.is_file():
        return ""
    try:
        *_, train, _, _ = read_state(state)["data"]
    except (ValueError, KeyError, TypeError):  # evaluation needs nothing else of the state
        return (
            f"warning: {state} cannot be read, so it is not known whether the images in {root} "
            "have changed since the run was trained"
        )
    if train == data.train.fingerprint():
        return ""
    return (
        f"warning: the images in {root} have changed since the run was trained; where validation "
        "and test images are split off at random, they now include images that it was trained on"
    )


def classify(classifier: Classifier, paths: list[Path], out: Path | None) -> None:
    """Print the most likely classes of image files, or write all probabilities to a CSV file.

    Args:
        classifier: of a run.
        paths: image files, and folders that contain them.
        out: the CSV file; None prints to the terminal.

    Raises:
        ValueError: for a path that is missing, a folder without images, or an ``out`` that cannot
            be written.
    """
    files = find_files(paths)
    if out is not None:
        unread = write_csv(classifier, files, output_file(out))
        print(escaped(f"wrote {len(files):,} predictions to {out}"))
    else:
        unread = 0
        for found in classifier(files):
            print(classifier.text(found))
            unread += bool(found.problem)
    if unread:
        print(f"{unread:,} of {len(files):,} files could not be read as images", file=sys.stderr)


def read_runs(paths: list[Path]) -> list[dict[str, Any]]:
    """Read the configuration, result, sessions and metrics of all runs in or below the folders.

    A folder whose files are not those of a run is skipped with a line on stderr. Runs whose folders
    have the same name have a "name" that tells them apart, the path below their common folder.
    """
    files = [file for path in paths for file in sorted(path.rglob("metrics.csv"))]
    found = {file.parent.resolve(): file.parent for file in files}  # each run once
    runs = []
    for folder in sorted(found.values()):
        try:
            runs.append(read_run(folder))
        except (ValueError, OSError) as error:
            print(f"skipped: {error_text(error)}", file=sys.stderr)
    names = Counter(name_of(run) for run in runs)
    same = [run for run in runs if names[name_of(run)] > 1]
    if same:
        places = [Path(os.path.abspath(run["folder"])) for run in same]
        common = os.path.commonpath([place.parent for place in places])
        for run, place in zip(same, places, strict=True):
            run["name"] = place.relative_to(common).as_posix()
    return runs


def read_run(folder: Path) -> dict[str, Any]:
    """Read the configuration, result, sessions and metrics of a run.

    Raises:
        ValueError: for a file that is not of a run.
    """
    config, result, sessions, metrics = (
        folder / name for name in ("config.yaml", "result.json", "sessions.json", "metrics.csv")
    )
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
        # at least one row, with the columns that the report shows
        max(row["val_top1"] + row["images_per_second"] + row["epoch"] for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{metrics} is not of a run: {error!r}") from error
    results = read_json(result, dict) if result.is_file() else {}
    if odd := [k for k, v in results.items() if not isinstance(v, int | float | None)]:
        raise ValueError(f"{result} is not of a run: {odd[0]} is not a number")
    options = read_yaml(config) if config.is_file() else {}
    data = options.get("data", {})
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), str | None) for key in ("name", "root")
    ):
        raise ValueError(
            f"{config} is not of a run: data {data} must be options, whose name and root are text"
        )
    started = read_json(sessions, list) if sessions.is_file() else []
    for session in started:
        words = session.get("command") if isinstance(session, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(
                f"{sessions} is not of a run: {session} must have a command, a list of words"
            )
    return {
        "folder": folder,
        "config": options,
        "rows": rows,
        "result": results,
        "sessions": started,
    }


def report(paths: list[Path], out: Path | None) -> str:
    """Write the page that compares runs, and return a table of them for the terminal.

    Raises:
        ValueError: for paths that are not folders, or without runs, or an ``out`` that cannot be
            written.
    """
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
    target = output_file(out or paths[0] / "report.html")
    runs = read_runs(paths)
    if not runs:
        raise ValueError(f"no runs (folders with metrics.csv) in {', '.join(map(str, paths))}")
    page(runs, target)
    return f"{table(runs).text()}\n\nthe page: {escaped(str(target))}"
