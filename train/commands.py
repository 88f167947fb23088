"""What can be done with the folders of runs: evaluate, predict, report."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import torch

from .atomic import read_json, read_yaml
from .augment import plain
from .config import RunConfig
from .data import decode, load_data, reading_of
from .devices import make_accelerator
from .evaluation import accuracy, predict
from .model import load_model
from .pixels import pixels_of
from .report import page, table


def resumable(path: Path) -> Path:
    """The folder of a run that can be resumed.

    Raises:
        ValueError: if there is no run, or it is complete.
    """
    folder = path.expanduser()
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"resume {folder}: there is no run (no config.yaml)")
    if (folder / "result.json").is_file():
        raise ValueError(f"resume {folder}: the run is complete, see its result.json")
    return folder


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
    """Measure the accuracy of the best weights of a run on one of its sets.

    Raises:
        ValueError: if the data has other classes now.
    """
    accelerator = make_accelerator(config.train)
    data = load_data(config.data, accelerator.device)
    for note in data.notes:
        print(note, file=sys.stderr)
    if data.classes != read_json(folder / "classes.json", list):
        raise ValueError(f"{config.data.root} has other classes now than {folder}/classes.json")
    model, _ = load_model(folder / "best.safetensors")
    model.to(accelerator.device)
    images = {"test": data.test, "val": data.val}[split]
    logits, labels = predict(
        model, images, accelerator, config.data.batch_size, config.data.workers
    )
    found = accuracy(logits, labels)
    return (
        f"{split} top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, loss {found.loss:.4f} "
        f"({len(labels):,} images)"
    )


@torch.no_grad()
def classify(folder: Path, config: RunConfig, files: list[str]) -> list[str]:
    """The five most likely classes of each image file, most likely first.

    Files are read as those of the run were.

    Raises:
        ValueError: for a file that cannot be read, or classes that are not those of the model.
    """
    classes: list[str] = read_json(folder / "classes.json", list)
    model, sizes = load_model(folder / "best.safetensors")
    if len(classes) != sizes.classes:
        raise ValueError(
            f"{folder}/classes.json must have {sizes.classes} classes, as the model, "
            f"not {len(classes)}"
        )
    reading = reading_of(config.data, sizes.channels)
    lines = []
    for file in files:
        image = decode(Path(file), sizes.image_size, reading)
        x = plain(image[None], pixels_of(model))
        shares, best = model(x).softmax(1)[0].topk(min(5, len(classes)))
        found = ", ".join(
            f"{classes[i]} {share:.1%}" for i, share in zip(best.tolist(), shares, strict=True)
        )
        lines.append(f"{file}: {found}")
    return lines


def read_runs(paths: list[Path]) -> list[dict[str, Any]]:
    """Read the configuration, result, sessions and metrics of all runs in or below the folders.

    Raises:
        ValueError: for a metrics.csv that is not of a run.
    """
    found = sorted({file.parent for path in paths for file in path.rglob("metrics.csv")})
    runs = []
    for folder in found:
        names = "config.yaml", "result.json", "sessions.json"
        config, result, sessions = (folder / name for name in names)
        try:
            lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
            # at least one row, with the columns that the report shows
            max(row["val_top1"] + row["images_per_second"] for row in rows)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / 'metrics.csv'} is not of a run: {error!r}") from error
        runs.append(
            {
                "folder": folder,
                "config": read_yaml(config) if config.is_file() else {},
                "rows": rows,
                "result": read_json(result, dict) if result.is_file() else {},
                "sessions": read_json(sessions, list) if sessions.is_file() else [],
            }
        )
    return runs


def report(paths: list[Path], out: Path | None) -> str:
    """Write the page that compares runs, and return a table of them for the terminal.

    Raises:
        ValueError: for paths that are not folders, or without runs.
    """
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
    runs = read_runs(paths)
    if not runs:
        raise ValueError(f"no runs (folders with metrics.csv) in {', '.join(map(str, paths))}")
    target = out or paths[0] / "report.html"
    page(runs, target)
    return f"{table(runs).text()}\n\nthe page: {target}"
